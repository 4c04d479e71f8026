"""What calibrated methods read of a part in layer-wise calibration: its sites, and sums over the inputs of their products."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import fx

from bmgraph.analysis.weight_sites import Weight, products, weight_of
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.layer_calibration import LayerPart
from bmgraph.verify.site_outputs import entering

DAMPING = 0.01
"""The share of the mean second moment that is added to each (Frantar et al. 2022, arXiv:2210.17323)."""

Sites = dict[str, tuple[Weight, list[fx.Node]]]
"""By site: its weight, and the products that read it."""


class LayerSites:
    """The chosen sites of a program, part by part."""

    def __init__(self, program: Program, chosen: Collection[str]) -> None:
        self._program, self._chosen = program, chosen
        self._uses = {
            site: len(nodes) for site, (_, nodes) in _grouped(program, products(program.graph)).items()
        }

    def of(self, part: LayerPart, context: Context) -> Sites:
        """Those of a part; what other parts read too is declined, since these are calibrated one after the other."""
        grouped = _grouped(self._program, part.products)
        found = {site: item for site, item in grouped.items() if site in self._chosen}
        for site in [site for site, (_, nodes) in found.items() if len(nodes) < self._uses[site]]:
            del found[site]
            context.declined(site, "it is used in several layers that are calibrated one after the other")
        return found


@dataclass
class InputSums:
    """Sums over the inputs x f[..., K] of products, in float64: with `whole` X^T X f[K, K], else the squares f[K].

    With `alike` every row x counts as x / |x|: a few tokens with huge values would otherwise decide alone.
    """

    whole: bool
    alike: bool = False
    _sums: dict[str, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def observed(part: LayerPart, sites: Sites, whole: bool, alike: bool = False) -> InputSums:
        """The sums over all calibration batches for the products of a part."""
        found = InputSums(whole, alike)
        part.observe({entering(node).name for _, nodes in sites.values() for node in nodes}, found.add)
        return found

    def add(self, name: str, x: torch.Tensor) -> None:
        """Take in the value of a node for one batch."""
        rows = x.reshape(-1, x.shape[-1])
        if self.alike:
            rows = torch.nn.functional.normalize(rows.float(), dim=1)
        found = (rows.float().T @ rows.float()).double() if self.whole else rows.double().square().sum(0)
        self._sums[name] = self._sums[name] + found if name in self._sums else found

    def of(self, readers: Sequence[fx.Node]) -> torch.Tensor:
        """The sum over all products that read one weight."""
        return reduce(torch.add, [self._sums[entering(node).name] for node in readers])


def inverse_root(second: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor f64[K, K] of the inverse of damped second moments f64[K, K].

    Its row k holds what the columns after k must take of an error in column k, beside the diagonal.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(second)))
    root: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return root


def damped(second: torch.Tensor) -> torch.Tensor:
    """Second moments f64[K, K] with DAMPING of their mean added to each; where there are none the unit matrix."""
    found = second.clone()
    diagonal = found.diagonal()
    mean = diagonal.mean()
    diagonal.add_(DAMPING * mean if mean > 0 else 1.0)
    return found


def _grouped(program: Program, nodes: Iterable[fx.Node]) -> Sites:
    found: Sites = {}
    for node in nodes:
        weight = weight_of(program, node)
        if weight is not None:
            found.setdefault(weight.site, (weight, []))[1].append(node)
    return found
