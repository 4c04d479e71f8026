"""LowRankAdapter: train bottlenecks whose matrices are products of low rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.structure.sites import Linear
from bmgraph.deltas.low_rank_adapter import (
    DOWN_LEFT,
    DOWN_RIGHT,
    UP_LEFT,
    UP_RIGHT,
    LowRankAdapterFamily,
)
from bmgraph.ir.program import Program
from bmgraph.passes.deltas.bottleneck_pass import ADAPTER_NAMES, BottleneckPass, check_positive


@dataclass(frozen=True, repr=False)
class LowRankAdapter(BottleneckPass):
    """Add bottlenecks as `Adapter` does, whose two matrices are products of two of `rank` rows or columns.

    reduction: outputs of the linear for each neuron of its adapter (at least one neuron). Options as in `BottleneckPass`.
    An adapter is no change of a weight, so `Merge` declines it.

    Raises PassError where a pattern matches nothing. Source: Mahabadi et al. 2021 (arXiv:2106.04647).
    """

    other_names: ClassVar[Mapping[str, str]] = MappingProxyType({**ADAPTER_NAMES, "low_rank_rank": "rank"})
    family: ClassVar[type[LowRankAdapterFamily]] = LowRankAdapterFamily

    reduction: int = 32
    rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("reduction", self.reduction)
        check_positive("rank", self.rank)

    def width(self, linear: Linear) -> int:
        """The outputs, divided by the reduction."""
        return max(1, linear.out_features // self.reduction)

    def new_matrices(
        self, program: Program, linear: Linear, stem: str, source: fx.Node | None
    ) -> Mapping[str, torch.Tensor]:
        """All uniform but the last factor, which is zero."""
        outputs, width = linear.out_features, self.width(linear)
        return {
            DOWN_LEFT: self.drawn(program, stem, DOWN_LEFT, width, self.rank),
            DOWN_RIGHT: self.drawn(program, stem, DOWN_RIGHT, self.rank, outputs),
            UP_LEFT: self.drawn(program, stem, UP_LEFT, outputs, self.rank),
            UP_RIGHT: torch.zeros(self.rank, width),
        }
