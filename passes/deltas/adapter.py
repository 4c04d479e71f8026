"""Adapter: train bottlenecks behind attentions and feed-forwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from bmgraph.analysis.structure.sites import Linear
from bmgraph.deltas.adapter import DOWN, UP, AdapterFamily
from bmgraph.ir.program import Program
from bmgraph.passes.deltas.bottleneck_pass import BottleneckPass, check_positive


@dataclass(frozen=True, repr=False)
class Adapter(BottleneckPass):
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

    bottleneck: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("bottleneck", self.bottleneck)

    def width(self, linear: Linear) -> int:
        """As given."""
        return self.bottleneck

    def new_matrices(self, program: Program, linear: Linear, stem: str) -> Mapping[str, torch.Tensor]:
        """down [r, out] uniform, up [out, r] zero."""
        outputs = linear.out_features
        down = self.drawn(program, stem, DOWN, self.bottleneck, outputs)
        return {DOWN: down, UP: torch.zeros(outputs, self.bottleneck)}
