"""Bottleneck adapters on linears: two matrices with an activation between, beside the output of a linear. Abstract.

    change = mul(linear(activation(linear(value, down, down_bias)), up, up_bias), scale)      down [r, in], up [out, r]
    total  = add(y, change)

A family says which value it reads (the output y, or the input of the block that ends in the linear), and what its matrices are
made of. An adapter is no change of a weight: it cannot be merged.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
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
from bmgraph.deltas.row_stacks import axes_of, row_matrix, row_vector, stacked_entries
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
    alike = (ACTIVATION,)
    rank_axes = MappingProxyType({DOWN: 2, DOWN_BIAS: 1, UP: 1})

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
        return f"{self.name} of width {change.tensors[DOWN_BIAS].shape[-1]}"

    def stacked(self, changes: Mapping[int, Change], count: int) -> Change:
        """down [count + 1, in, r], up [count + 1, r, out] and their biases, the scale multiplied into those of up; zeros for
        smaller widths and for no delta."""
        return Change(
            stacked_entries({number: self.row_entry(item) for number, item in changes.items()}, count)
        )

    def row_entry(self, change: Change) -> Mapping[str, torch.Tensor]:
        """The matrices transposed, those of up and its bias times the scale."""
        down, up = self.matrices_of(change.tensors)
        tensors, scale = change.tensors, change.numbers[SCALE]
        return {
            DOWN: down.T, DOWN_BIAS: tensors[DOWN_BIAS], UP: up.T * scale, UP_BIAS: tensors[UP_BIAS] * scale
        }  # fmt: skip

    def build_rows(self, call: DeltaCalls, x: fx.Node, chosen: Mapping[str, fx.Node]) -> fx.Node:
        """Add the adapter of each row: two batched matrix products."""
        value = self.value(call)
        narrow = axes_of(value) == 2
        if narrow:
            value = call(aten.unsqueeze.default, value, 1)
        axes = axes_of(value)
        down, up = (row_matrix(call, chosen[key], axes) for key in (DOWN, UP))
        down_bias, up_bias = (row_vector(call, chosen[key], axes) for key in (DOWN_BIAS, UP_BIAS))
        inner = call(aten.add.Tensor, call(aten.matmul.default, value, down), down_bias)
        active = call(ACTIVATIONS[call.options[ACTIVATION]], inner)
        outer = call(aten.add.Tensor, call(aten.matmul.default, active, up), up_bias)
        return call.end(aten.add.Tensor, call.linear, call(aten.squeeze.dim, outer, 1) if narrow else outer)

    def options_of_rows(self, nodes: Iterable[fx.Node]) -> Mapping[str, Any]:
        """The activation."""
        called = {node.target for node in nodes}
        found = [name for name, target in ACTIVATIONS.items() if target in called]
        return {ACTIVATION: found[0]} if found else {}

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
