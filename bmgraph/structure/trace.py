"""Walking the dataflow: up to the linears that a value is made of, down to those that read it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers our operators)

aten = torch.ops.aten
ours = torch.ops.bmgraph


def _names(*packets: Any) -> frozenset[Any]:
    """All overloads of some operators."""
    return frozenset(getattr(packet, name) for packet in packets for name in packet.overloads())


SHAPES = _names(
    aten.reshape, aten.view, aten.transpose, aten.permute, aten.t, aten.unsqueeze, aten.squeeze, aten.expand, aten.flatten,
    aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.unflatten, aten.repeat,
    aten.repeat_interleave, aten.narrow, aten.index_select, aten.movedim, aten.constant_pad_nd, aten.pad, aten.roll,
    aten.unfold, aten.slice_scatter, aten.tensor_split, aten.swapaxes,
)  # fmt: skip
"""Operators that move values and compute none."""

ROUNDINGS = _names(ours.quantize_static, ours.quantize_dynamic)

QUIET = (
    _names(aten.dropout, aten.to, aten.detach, aten.clamp, aten.cat, aten.masked_fill, aten.where, aten.index)
    | ROUNDINGS
    | SHAPES
)
"""Operators that keep what a value means."""

ARITHMETIC = _names(aten.mul, aten.add, aten.sub, aten.neg, aten.div, aten.stack)
NORMS = _names(aten.layer_norm, aten.rms_norm, aten.group_norm, aten.batch_norm, aten.instance_norm)

ACTIVATIONS = _names(
    aten.gelu, aten.relu, aten.silu, aten.tanh, aten.sigmoid, aten.elu, aten.hardswish, aten.mish, aten.leaky_relu,
    aten.softplus, aten.relu6, aten.erf, aten.square, aten.pow,
)  # fmt: skip


def getitem(node: fx.Node) -> bool:
    """Whether a node picks one of several results."""
    return getattr(node.target, "__name__", "") == "getitem"


@dataclass(frozen=True)
class Walk:
    """The nodes that a walk looked for, those that it passed, and those where it had to end."""

    found: list[fx.Node]
    passed: list[fx.Node]
    ends: list[fx.Node]


def upwards(start: Any, through: Collection[Any], stop: Callable[[fx.Node], bool]) -> Walk:
    """Walk upstream to the first nodes that `stop` holds for; operators other than `through` end the walk."""
    found: list[fx.Node] = []
    passed: list[fx.Node] = []
    ends: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [start] if isinstance(start, fx.Node) else []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if stop(node):
            found.append(node)
        elif node.op == "call_function" and (node.target in through or getitem(node)):
            passed.append(node)
            stack.extend(reversed(_tensor_inputs(node)))
        else:
            ends.append(node)
    return Walk(found, passed, ends)


def _tensor_inputs(node: fx.Node) -> list[fx.Node]:
    return [
        item for item in node.all_input_nodes if isinstance(item.meta.get("val"), (torch.Tensor, list, tuple))
    ]


def downwards(start: fx.Node, through: Collection[Any], stop: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    """The first nodes downstream that `stop` holds for."""
    seen: set[fx.Node] = set()
    stack = list(start.users)
    while stack:
        node = stack.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if stop(node):
            yield node
        elif node.op == "call_function" and (node.target in through or getitem(node)):
            stack.extend(node.users)


def is_linear(node: fx.Node) -> bool:
    """Whether a node multiplies with a weight."""
    return node.op == "call_function" and node.target is aten.linear.default


def source_of(linear: fx.Node) -> fx.Node:
    """What a linear reads, with what keeps its meaning looked through: equal for q, k and v of one attention."""
    node: Any = linear.args[0]
    while (
        isinstance(node, fx.Node) and node.op == "call_function" and (node.target in QUIET or getitem(node))
    ):
        inputs = _tensor_inputs(node)
        if not inputs:
            break
        node = inputs[0]
    assert isinstance(node, fx.Node)
    return node
