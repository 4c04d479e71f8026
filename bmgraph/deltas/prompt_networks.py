"""Networks that make the embeddings of soft tokens while they train: P-tuning's LSTM and MLP (Liu et al. 2021, arXiv:2103.10385).

An LSTM is written out token by token, so that every backend, step pass and file knows its operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

LAYERS = 2
"""Layers of the LSTM, each in both directions."""

Call = Callable[..., fx.Node]
"""Adds a call."""
Parameter = Callable[[str, tuple[int, ...], float], fx.Node]
"""Adds a parameter by its name, its shape and the bound of its uniform random numbers, and reads it."""


def network(kind: str, vectors: fx.Node, count: int, width: int, call: Call, parameter: Parameter) -> fx.Node:
    """What a network makes of embeddings [count, width]: [count, width].

    "mlp": linear, relu, linear. "lstm": an LSTM of two layers in both directions, width features each, and an mlp behind it.
    """
    if kind == "none":
        return vectors
    inner = width
    if kind == "lstm":
        vectors, inner = _lstm(vectors, count, width, call, parameter), 2 * width
    for name, inputs in (("first", inner), ("second", width)):
        bound = 1 / math.sqrt(inputs)
        weight, bias = (
            parameter(f"mlp_{name}_weight", (width, inputs), bound),
            parameter(f"mlp_{name}_bias", (width,), bound),
        )
        vectors = call(aten.linear.default, vectors, weight, bias)
        if name == "first":
            vectors = call(aten.relu.default, vectors)
    return vectors


def _lstm(x: fx.Node, count: int, width: int, call: Call, parameter: Parameter) -> fx.Node:
    """[count, width] -> [count, 2 * width]."""
    inputs = width
    for layer in range(LAYERS):
        sides = []
        for side in ("forward", "backward"):
            name = f"lstm_{layer}_{side}"
            bound = 1 / math.sqrt(width)
            names = (("input", (4 * width, inputs)), ("hidden", (4 * width, width)))
            read = [
                (
                    parameter(f"{name}_{end}_weight", shape, bound),
                    parameter(f"{name}_{end}_bias", shape[:1], bound),
                )
                for end, shape in names
            ]
            gates = call(aten.linear.default, x, *read[0])
            sides.append(_direction(gates, read[1], count, width, side == "backward", call))
        x = call(aten.cat.default, sides, 1)
        inputs = 2 * width
    return x


def _direction(
    gates: fx.Node, hidden: tuple[fx.Node, fx.Node], count: int, width: int, backward: bool, call: Call
) -> fx.Node:
    """The states [count, width] of one direction; `gates` [count, 4 * width] are what the inputs add to its gates."""
    state: Any = None
    cell: Any = None
    found: list[Any] = [None] * count
    for place in reversed(range(count)) if backward else range(count):
        own = call(aten.slice.Tensor, gates, 0, place, place + 1)
        if state is None:  # a state of zeros adds its bias alone
            own = call(aten.add.Tensor, own, hidden[1])
        else:
            own = call(aten.add.Tensor, own, call(aten.linear.default, state, *hidden))
        parts = [call(aten.slice.Tensor, own, 1, part * width, (part + 1) * width) for part in range(4)]
        enter, forget, give = (call(aten.sigmoid.default, parts[part]) for part in (0, 1, 3))
        new = call(aten.mul.Tensor, enter, call(aten.tanh.default, parts[2]))
        cell = new if cell is None else call(aten.add.Tensor, call(aten.mul.Tensor, forget, cell), new)
        state = call(aten.mul.Tensor, give, call(aten.tanh.default, cell))
        found[place] = state
    return call(aten.cat.default, found, 0)
