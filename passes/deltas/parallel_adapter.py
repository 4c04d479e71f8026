"""ParallelAdapter: train bottlenecks beside attentions and feed-forwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from bmgraph.analysis.structure.sites import Linear
from bmgraph.deltas.delta_calls import delta_input
from bmgraph.deltas.parallel_adapter import ParallelAdapterFamily
from bmgraph.passes.deltas.bottleneck_pass import PlainBottleneckPass


@dataclass(frozen=True, repr=False)
class ParallelAdapter(PlainBottleneckPass):
    """Add bottlenecks of `bottleneck` neurons that read the input of an attention or a feed-forward, to its output.

    Options as in `BottleneckPass`; targets and roles name the last linear of the block, which is found in the structure. An
    adapter is no change of a weight, so `Merge` declines it.

    Raises PassError where a pattern matches nothing. Source: He et al. 2022 (arXiv:2110.04366).
    """

    family: ClassVar[type[ParallelAdapterFamily]] = ParallelAdapterFamily

    def inputs(self, linear: Linear, source: fx.Node | None) -> int:
        """The width of the input of the block."""
        assert source is not None, "a linear that ends no block is declined"
        return int(delta_input(source).meta["val"].shape[-1])
