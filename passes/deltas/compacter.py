"""Compacter: train bottlenecks whose matrices are sums of Kronecker products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.structure.sites import Linear, Structure
from bmgraph.deltas.compacter import RULE, CompacterFamily
from bmgraph.deltas.low_rank_adapter import DOWN_LEFT, DOWN_RIGHT, UP_LEFT, UP_RIGHT
from bmgraph.ir.program import Program
from bmgraph.passes.deltas.bottleneck_pass import ADAPTER_NAMES, BottleneckPass, check_positive


@dataclass(frozen=True, repr=False)
class Compacter(BottleneckPass):
    """Add bottlenecks as `Adapter` does, whose matrices are sums of `division` Kronecker products of a small matrix, that all
    adapters share, and a product of `rank`.

    reduction: outputs of the linear for each neuron of its adapter, whose number is a multiple of `division`. Options as in
    `BottleneckPass`. Linears whose outputs are no multiple of `division` are declined. An adapter is no change of a weight,
    so `Merge` declines it.

    Raises PassError where a pattern matches nothing. Source: Mahabadi et al. 2021 (arXiv:2106.04647).
    """

    other_names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {**ADAPTER_NAMES, "hypercomplex_division": "division", "phm_rank": "rank"}
    )
    family: ClassVar[type[CompacterFamily]] = CompacterFamily

    reduction: int = 16
    division: int = 4
    rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reduction", "division", "rank"):
            check_positive(name, getattr(self, name))

    def why_not(self, program: Program, structure: Structure, linear: Linear) -> str:
        """A number of outputs that cannot be divided."""
        if linear.out_features % self.division == 0:
            return ""
        return f"its {linear.out_features} outputs are no multiple of division={self.division}"

    def width(self, linear: Linear) -> int:
        """The outputs, divided by the reduction, as a multiple of the division."""
        return self.division * max(1, linear.out_features // (self.reduction * self.division))

    def new_matrices(
        self, program: Program, linear: Linear, stem: str, source: fx.Node | None
    ) -> Mapping[str, torch.Tensor]:
        """All uniform but the last factor, which is zero."""
        n, k = self.division, self.rank
        outputs, width = linear.out_features // n, self.width(linear) // n
        return {
            RULE: self.drawn(program, "", RULE, n, n, n),
            DOWN_LEFT: self.drawn(program, stem, DOWN_LEFT, n, width, k),
            DOWN_RIGHT: self.drawn(program, stem, DOWN_RIGHT, n, k, outputs),
            UP_LEFT: self.drawn(program, stem, UP_LEFT, n, outputs, k),
            UP_RIGHT: torch.zeros(n, k, width),
        }
