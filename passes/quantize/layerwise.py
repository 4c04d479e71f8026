"""Quantizes products layer by layer, by a method that reads the second moments of their inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.weight_sites import Weight, products, weight_of
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.layer_calibration import LayerPart
from bmgraph.passes.quantize.block_codes import BlockCodes
from bmgraph.passes.quantize.round_inputs import InputRounding
from bmgraph.utils.stored_tensor import in_memory
from bmgraph.verify.site_outputs import entering

ChooseCodes = Callable[[BlockCodes, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(format, weight f[N, K], second moments f64[K, K] of its inputs) -> codes i8[N, K] and scales f[N, B]."""

ROWS = 8192
"""Outputs whose error is computed at once."""


@dataclass
class LayerwiseQuantization:
    """Rewrites the products of one layer after the other: each is calibrated on what the layers before it, quantized, give.

    A site whose output moves by more than `site_drift` (relative L2, over all calibration batches) is declined. `what` says
    in reports what a site becomes.
    """

    program: Program
    context: Context
    form: BlockCodes
    choose: ChooseCodes
    sites: Collection[str]
    site_drift: float
    what: str
    by: str
    rounding: InputRounding
    _uses: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        """Calibrate and rewrite all layers. Raises what `Context.calibrate_layers` does."""
        for product in products(self.program.graph):
            weight = weight_of(self.program, product)
            if weight is not None:
                self._uses[weight.site] = self._uses.get(weight.site, 0) + 1
        self.context.calibrate_layers(self.program, self._rewrite)

    def _rewrite(self, part: LayerPart) -> None:
        found: dict[str, tuple[Weight, list[fx.Node]]] = {}
        for product in part.products:
            weight = weight_of(self.program, product)
            if weight is not None and weight.site in self.sites:
                found.setdefault(weight.site, (weight, []))[1].append(product)
        apart = [site for site, (_, nodes) in found.items() if len(nodes) < self._uses[site]]
        for site in apart:
            del found[site]
            self.context.declined(
                site, "it is used in several layers that are calibrated one after the other"
            )
        if found:
            self._quantize(part, found)

    def _quantize(self, part: LayerPart, found: dict[str, tuple[Weight, list[fx.Node]]]) -> None:
        moments, rounding = _Moments(), self.rounding.alone()
        part.observe({entering(node).name for _, nodes in found.values() for node in nodes}, moments.add)
        with self.program.edit(by=self.by) as editor:
            for site, (weight, nodes) in found.items():
                value = in_memory(evaluate(self.program, weight.node))
                matrix = value.T if weight.transposed else value
                second = sum((moments.sums[entering(node).name] for node in nodes), torch.zeros(()))
                codes, scale = self.choose(self.form, matrix, second)
                packed = self.form.packed(codes)
                moved = _moved(matrix, self.form.decode(packed, scale, matrix.shape, 0), second)
                if not moved <= self.site_drift:
                    self.context.declined(
                        site,
                        f"its output would change by {moved:.3f} (relative), more than site_drift={self.site_drift:g}",
                    )
                    continue
                made = self.form.place(editor, weight, packed, scale, min(weight.node.users), site)
                weight.node.replace_all_uses_with(made)
                for node in nodes:
                    rounding.apply(editor, node, site)
                self.context.edited(site, f"{self.what}, its output moved by {moved:.2g} (relative)")


class _Moments:
    """X^T X of the values X f[..., K] of nodes, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, x: torch.Tensor) -> None:
        """Take in the values of one batch."""
        rows = x.reshape(-1, x.shape[-1]).float()
        product = (rows.T @ rows).double()
        self.sums[name] = self.sums[name] + product if name in self.sums else product


def _moved(old: torch.Tensor, new: torch.Tensor, second: torch.Tensor) -> float:
    """The relative error (L2) of X new^T from X old^T, from X^T X alone."""
    moments, sums = second.float(), [0.0, 0.0]
    for begin in range(0, len(old), ROWS):
        rows = slice(begin, begin + ROWS)
        for index, value in enumerate((new[rows].float() - old[rows].float(), old[rows].float())):
            sums[index] += float(((value @ moments) * value).sum(dtype=torch.float64))
    changed, scale = (math.sqrt(max(item, 0.0)) for item in sums)
    return changed / scale if scale > 0 else changed
