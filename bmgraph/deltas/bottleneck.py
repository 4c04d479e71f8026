"""Bottleneck adapters on linears: two matrices with an activation between, beside the output of a linear. Abstract.

    change = mul(linear(activation(linear(value, down, down_bias)), up, up_bias), scale)      down [r, in], up [out, r]
    total  = add(y, change)

A family says which value it reads (the output y, or the input of the block that ends in the linear), and what its matrices are
made of. An adapter is no change of a weight: it cannot be merged.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import fx

from bmgraph.deltas.delta_calls import DeltaCalls
from bmgraph.deltas.family import Change, Part, Saved
from bmgraph.deltas.linear_family import LinearFamily
from bmgraph.deltas.module_matching import Sizes
from bmgraph.deltas.plain_format import plain_loaded, plain_saved
from bmgraph.ir.program import Program
from bmgraph.ops.activations import ACTIVATIONS

aten = torch.ops.aten

ACTIVATION, SCALE, DOWN_BIAS, UP_BIAS = "activation", "scale", "down_bias", "up_bias"
DOWN, UP = "down", "up"


class BottleneckFamily(LinearFamily):
    """Adapters beside the output of linears; a subclass says what they read and what their matrices are made of."""

    folds: ClassVar[bool] = False
    numbers = (SCALE,)
    choices = MappingProxyType({ACTIVATION: tuple(ACTIVATIONS)})

    @abstractmethod
    def matrices(self, call: DeltaCalls, tensors: Mapping[str, fx.Node]) -> tuple[fx.Node, fx.Node]:
        """The expressions of down [r, in] and up [out, r]."""

    @abstractmethod
    def matrices_of(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The values of down [r, in] and up [out, r], computed by other means than `matrices`."""

    def value(self, call: DeltaCalls) -> fx.Node:
        """What the adapter reads: the output of the linear."""
        read: fx.Node = call.linear
        return read

    def build(
        self, call: DeltaCalls, tensors: Mapping[str, fx.Node], change: Change, options: Mapping[str, Any]
    ) -> fx.Node:
        """Add the adapter to the output."""
        down, up = self.matrices(call, tensors)
        inner = call(aten.linear.default, self.value(call), down, tensors[DOWN_BIAS])
        active = call(ACTIVATIONS[options[ACTIVATION]], inner)
        outer = call(aten.linear.default, active, up, tensors[UP_BIAS])
        return call.end(aten.add.Tensor, call.linear, call(aten.mul.Tensor, outer, change.numbers[SCALE]))

    def applied(
        self,
        change: Change,
        options: Mapping[str, Any],
        x: torch.Tensor,
        y: torch.Tensor,
        source: torch.Tensor | None,
    ) -> torch.Tensor:
        """y and the adapter, written out."""
        down, up = self.matrices_of(change.tensors)
        activate = getattr(torch.nn.functional, options[ACTIVATION])
        inner = torch.matmul(y if source is None else source, down.T) + change.tensors[DOWN_BIAS]
        outer = torch.matmul(activate(inner), up.T) + change.tensors[UP_BIAS]
        return y + change.numbers[SCALE] * outer

    def sizes(self, change: Change) -> Sizes:
        """As many outputs as the second bias."""
        return change.tensors[UP_BIAS].shape[0], None

    def describe(self, change: Change) -> str:
        """Its width."""
        return f"{self.name} of width {change.tensors[DOWN_BIAS].shape[0]}"

    def saved(self, program: Program) -> Saved | None:
        """One tensor a key; PEFT has no adapters."""
        return plain_saved(self, program)

    def loaded(self, path: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Part:
        """Read what `saved` wrote."""
        return plain_loaded(self, path, config, tensors)


class PlainBottleneckFamily(BottleneckFamily):
    """Bottleneck adapters whose matrices are parameters. Abstract."""

    keys = (DOWN, DOWN_BIAS, UP, UP_BIAS)
    axes = MappingProxyType({DOWN: 2, DOWN_BIAS: 1, UP: 2, UP_BIAS: 1})

    def matrices(self, call: DeltaCalls, tensors: Mapping[str, fx.Node]) -> tuple[fx.Node, fx.Node]:
        """The parameters."""
        return tensors[DOWN], tensors[UP]

    def matrices_of(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The parameters."""
        return tensors[DOWN], tensors[UP]
