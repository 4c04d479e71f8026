"""ParallelAdapter: train bottlenecks beside attentions and feed-forwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from bmgraph.analysis.structure.sites import Linear
from bmgraph.deltas.adapter import DOWN, UP
from bmgraph.deltas.parallel_adapter import ParallelAdapterFamily
from bmgraph.ir.program import Program
from bmgraph.passes.deltas.bottleneck_pass import BottleneckPass, check_positive


@dataclass(frozen=True, repr=False)
class ParallelAdapter(BottleneckPass):
    """Add bottlenecks of `bottleneck` neurons that read the input of an attention or a feed-forward, to its output.

    Options as in `BottleneckPass`; targets and roles name the last linear of the block, which is found in the structure. An
    adapter is no change of a weight, so `Merge` declines it.

    Raises PassError where a pattern matches nothing. Source: He et al. 2022 (arXiv:2110.04366).
    """

    family: ClassVar[type[ParallelAdapterFamily]] = ParallelAdapterFamily

    bottleneck: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("bottleneck", self.bottleneck)

    def width(self, linear: Linear) -> int:
        """As given."""
        return self.bottleneck

    def new_matrices(self, program: Program, linear: Linear, stem: str) -> Mapping[str, torch.Tensor]:
        """down [r, in] uniform, up [out, r] zero; in is the width of the input of the block."""
        source = self.family().sources(program)[linear.uses[0].node]
        down = self.drawn(program, stem, DOWN, self.bottleneck, int(source.meta["val"].shape[-1]))
        return {DOWN: down, UP: torch.zeros(linear.out_features, self.bottleneck)}
