"""What weights are compared by, and the sums over calibration data that some scores read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from bmgraph.analysis.weight_sites import Weight
from bmgraph.pass_manager.layer_calibration import LayerPart
from bmgraph.verify.site_outputs import entering

MAGNITUDE, WANDA, SPARSEGPT = "magnitude", "wanda", "sparsegpt"

SCORES: dict[str, str] = {
    MAGNITUDE: "the absolute value",
    WANDA: "the absolute value times the norm (L2) of its input over calibration data (Sun et al. 2023, arXiv:2306.11695)",
    SPARSEGPT: "what dropping it costs after the other weights have made up for it, which they then do (Frantar and Alistarh 2023, "
    "arXiv:2301.00774)",
}
"""Name of a score -> what it is."""


@dataclass
class InputSums:
    """Sums over the inputs x f[..., in] of products, in float64: squares f[in], and with `whole` X^T X f[in, in]."""

    whole: bool
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def visit(self, name: str, x: torch.Tensor) -> None:
        """Add a batch of the value of a node."""
        rows = x.reshape(-1, x.shape[-1]).double()
        found = rows.T @ rows if self.whole else rows.square().sum(0)
        self.sums[name] = self.sums[name] + found if name in self.sums else found

    def of(self, readers: Sequence[fx.Node]) -> torch.Tensor:
        """The sum over all products that read one weight."""
        return torch.stack([self.sums[entering(node).name] for node in readers]).sum(0)

    @staticmethod
    def observed(
        part: LayerPart, sites: Mapping[str, tuple[Weight, list[fx.Node]]], whole: bool
    ) -> InputSums:
        """The sums for the products of a part."""
        found = InputSums(whole)
        part.observe({entering(node).name for _, nodes in sites.values() for node in nodes}, found.visit)
        return found


Score = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(weight [out, in], squares of its inputs [in]) -> the importance of each element [out, in]."""


def magnitude(weight: torch.Tensor, squares: torch.Tensor | None) -> torch.Tensor:
    """The absolute values."""
    return weight.abs()


def wanda(weight: torch.Tensor, squares: torch.Tensor | None) -> torch.Tensor:
    """The absolute values times the norms of the inputs."""
    assert squares is not None
    return weight.abs() * squares.sqrt().to(weight.dtype)


FUNCTIONS: dict[str, Score] = {MAGNITUDE: magnitude, WANDA: wanda}
