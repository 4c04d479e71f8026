"""Adapter: train bottlenecks behind attentions and feed-forwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from bmgraph.analysis.structure.sites import Linear
from bmgraph.deltas.adapter import AdapterFamily
from bmgraph.passes.deltas.bottleneck_pass import PlainBottleneckPass


@dataclass(frozen=True, repr=False)
class Adapter(PlainBottleneckPass):
    """Add bottlenecks of `bottleneck` neurons that read the output of a linear and are added to it, before the residual.

    Options as in `BottleneckPass`. An adapter is no change of a weight, so `Merge` declines it.

    Raises PassError where a pattern matches nothing. Source: Houlsby et al. 2019 (arXiv:1902.00751).

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import Adapter
        >>> program = bg.capture(torch.nn.Linear(6, 4), (torch.randn(3, 6),))
        >>> tuned = bg.Pipeline([Adapter(2, targets=("*",))]).run(program)
        >>> sorted(set(tuned.parameters) - tuned.frozen)
        ['weight_adapter_down', 'weight_adapter_down_bias', 'weight_adapter_up', 'weight_adapter_up_bias']
    """

    family: ClassVar[type[AdapterFamily]] = AdapterFamily

    def inputs(self, linear: Linear, source: fx.Node | None) -> int:
        """The outputs of the linear."""
        return linear.out_features
