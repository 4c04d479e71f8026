"""The graph that a step runs: without calls that compute nothing, with gradients written where they are reduced.

Every value that the step returns stays the same, bit by bit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
functional = torch.ops._c10d_functional

Take = Callable[[int, torch.dtype, torch.device], torch.Tensor]
"""(number of elements, dtype, device) -> an uninitialised flat tensor."""

SAME = (aten.detach.default, aten.alias.default)
"""Operators whose result is their argument."""
WITH_RESULT = {aten.mm.default: aten.mm.out, aten.add.Tensor: aten.add.out, aten.bmm.default: aten.bmm.out}
"""Operators that can write their result where it is wanted."""
OWN = "own"
"""Metadata key of a collective whose argument nothing else reads, so that it may write there."""
REDUCTIONS = (functional.reduce_scatter_tensor.default, functional.all_reduce.default)


def drop_idle_calls(graph: fx.Graph) -> None:
    """Remove calls that give their argument back: detach, two transpositions, a power of one."""
    for node in list(graph.nodes):
        same = _same(node)
        if same is not None:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.target is aten.t.default and not node.users:
            graph.erase_node(node)


def accumulate_in_place(graph: fx.Graph) -> None:
    """Let rows be added to a result of an operator in its own memory, where nothing else reads it."""
    for node in graph.nodes:
        if node.target is aten.index_add.default:
            source = node.args[0]
            if source.target is operator.getitem and set(source.users) == {node}:
                node.target = aten.index_add_.default


def _same(node: fx.Node) -> fx.Node | None:
    """The node whose value a call returns as it is."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    if node.target in SAME:
        return source
    if node.target is aten.t.default and source.target is aten.t.default:
        inner: Any = source.args[0]
        return inner if isinstance(inner, fx.Node) else None
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 1:
        return source
    return None


def write_into_buckets(graph: fx.Graph, take: Take) -> None:
    """Let the gradients that a collective sums be written to one flat buffer, instead of being joined afterwards."""
    for node in list(graph.nodes):
        if node.target is aten.cat.default and len(node.users) == 1:
            (user,) = node.users
            if user.target in REDUCTIONS and _is_flat(node):
                user.meta[OWN] = True
                _write(graph, node, take)


def _is_flat(node: fx.Node) -> bool:
    """Whether a call joins flat tensors of fixed sizes."""
    parts: Any = node.args[0]
    values = [part.meta.get("val") for part in parts]
    return len(node.args) == 1 and all(
        isinstance(value, torch.Tensor) and value.dim() == 1 and isinstance(value.shape[0], int)
        for value in values
    )


def _write(graph: fx.Graph, joined: fx.Node, take: Take) -> None:
    order = {node: index for index, node in enumerate(graph.nodes)}
    parts: list[fx.Node] = list(joined.args[0])  # type: ignore[arg-type]
    whole = joined.meta["val"]
    sources = [_made(part) for part in parts if not _is_zero(part)]
    with graph.inserting_before(min(sources, key=order.__getitem__)):
        buffer = graph.call_function(_taking(take), (int(whole.shape[0]), whole.dtype, whole.device))
    buffer.meta["val"] = whole
    joined.replace_all_uses_with(buffer)
    graph.erase_node(joined)
    for zeros in [part for part in parts if _is_zero(part)]:
        if not zeros.users:
            graph.erase_node(zeros)
    offset = 0
    for part in parts:
        count = int(part.meta["val"].shape[0])
        if _is_zero(part):
            with graph.inserting_after(buffer):
                flat = graph.call_function(aten.slice.Tensor, (buffer, 0, offset, offset + count))
            with graph.inserting_after(flat):
                graph.call_function(aten.zero_.default, (flat,))
        else:
            _write_part(graph, part, buffer, offset, count)
        offset += count


def _is_zero(part: fx.Node) -> bool:
    return part.target is aten.new_zeros.default


def _write_part(graph: fx.Graph, part: fx.Node, buffer: fx.Node, offset: int, count: int) -> None:
    """Write a gradient, whose flat form is `part`, to its place in the buffer."""
    source = _made(part)
    shape = [int(size) for size in source.meta["val"].shape]
    own = source is not part and set(source.users) == {part} and not part.users
    can_write = own and source.target in WITH_RESULT and not source.kwargs
    with graph.inserting_before(source if can_write else source.next):
        flat = graph.call_function(aten.slice.Tensor, (buffer, 0, offset, offset + count))
        view = graph.call_function(aten.view.default, (flat, shape))
        if can_write:
            writes: Any = WITH_RESULT[source.target]  # type: ignore[index]
            graph.call_function(writes, source.args, {"out": view})
        else:
            graph.call_function(aten.copy_.default, (view, source))
    if not part.users and source is not part:
        graph.erase_node(part)
        if can_write:
            graph.erase_node(source)


def _made(part: fx.Node) -> fx.Node:
    """The call that computes a part, behind a reshape."""
    source: Any = part.args[0]
    behind = part.target is aten.reshape.default and source.op == "call_function"
    return source if behind else part


def _taking(take: Take) -> Take:
    def take_buffer(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return take(count, dtype, device)

    return take_buffer
