"""Quantizes products layer by layer, by a method that reads the second moments of their inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.weight_sites import Weight
from bmgraph.ir.editor import Editor
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.layer_calibration import LayerPart
from bmgraph.pass_manager.layer_sites import InputSums, LayerSites, Sites
from bmgraph.passes.quantize.block_codes import BlockCodes
from bmgraph.passes.quantize.code_grid import CodeGrid, Encoded
from bmgraph.passes.quantize.round_inputs import InputRounding
from bmgraph.utils.stored_tensor import in_memory

ChooseCodes = Callable[[BlockCodes, torch.Tensor, torch.Tensor], tuple[torch.Tensor, CodeGrid]]
"""(format, weight f[N, K], second moments f64[K, K] of its inputs) -> codes i8[N, K] and grids [N, B]."""

PlaceCodes = Callable[[Editor, BlockCodes, Weight, Encoded], fx.Node]
"""(editor, format, weight, what was chosen for it) -> the node that stands for the weight from then on."""

_Chosen = tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], float]
"""A weight as it is stored (`Encoded`), and by how much its outputs move."""

ROWS = 8192
"""Outputs whose error is computed at once."""


def as_codes(editor: Editor, form: BlockCodes, weight: Weight, stored: Encoded) -> fx.Node:
    """The weight as its codes."""
    return form.place(editor, weight, stored, min(weight.node.users), weight.site)


@dataclass
class LayerwiseQuantization:
    """Rewrites the products of one layer after the other: each is calibrated on what the layers before it, quantized, give.

    `forms`: the format of each site. One whose output moves by more than `site_drift` (relative L2, over all calibration batches)
    is declined. `what` says in reports what a site becomes. With `alike` every row of an input counts the same. `place` lets the program
    read what was chosen: by default as codes.
    """

    program: Program
    context: Context
    forms: Mapping[str, BlockCodes]
    choose: ChooseCodes
    site_drift: float
    what: Callable[[str], str]
    by: str
    rounding: InputRounding
    alike: bool = False
    place: PlaceCodes = as_codes

    def run(self) -> None:
        """Calibrate and rewrite all layers. Raises what `Context.calibrate_layers` does."""
        sites = LayerSites(self.program, self.forms)
        self.context.calibrate_layers(self.program, lambda part: self._rewrite(part, sites))

    def _rewrite(self, part: LayerPart, sites: LayerSites) -> None:
        found = sites.of(part, self.context)
        if found:
            self._quantize(part, found)

    def _quantize(self, part: LayerPart, found: Sites) -> None:
        chosen = self.context.kept(f"codes of {part}", lambda: self._chosen(part, found))
        rounding = self.rounding.alone()
        with self.program.edit(by=self.by) as editor:
            for site, (weight, nodes) in found.items():
                stored, moved = chosen[site]
                if not moved <= self.site_drift:
                    self.context.declined(
                        site,
                        f"its output would change by {moved:.3f} (relative), more than site_drift={self.site_drift:g}",
                    )
                    continue
                editor.replace(weight.node, self.place(editor, self.forms[site], weight, Encoded(*stored)))
                for node in nodes:
                    rounding.apply(editor, node, site)
                self.context.edited(site, f"{self.what(site)}, its output moved by {moved:.2g} (relative)")

    def _chosen(self, part: LayerPart, found: Sites) -> dict[str, _Chosen]:
        """What the method chooses for the sites of a part, by what flows into them."""
        moments = InputSums.observed(part, found, whole=True, alike=self.alike)
        chosen: dict[str, _Chosen] = {}
        for site, (weight, nodes) in found.items():
            value = in_memory(evaluate(self.program, weight.node))
            matrix = value.T if weight.transposed else value
            second, form = moments.of(nodes), self.forms[site]
            stored = form.stored(*self.choose(form, matrix, second))
            chosen[site] = (
                (stored.codes, stored.scale, stored.zero),
                _moved(matrix, form.decode(stored, matrix.shape, 0), second),
            )
        return chosen


def _moved(old: torch.Tensor, new: torch.Tensor, second: torch.Tensor) -> float:
    """The relative error (L2) of X new^T from X old^T, from X^T X alone."""
    moments, sums = second.float(), [0.0, 0.0]
    for begin in range(0, len(old), ROWS):
        rows = slice(begin, begin + ROWS)
        for index, value in enumerate((new[rows].float() - old[rows].float(), old[rows].float())):
            sums[index] += float(((value @ moments) * value).sum(dtype=torch.float64))
    changed, scale = (math.sqrt(max(item, 0.0)) for item in sums)
    return changed / scale if scale > 0 else changed
