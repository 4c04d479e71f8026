"""Finds what gives the channels of a value: a linear or a norm whose weights a scale of the channels can be moved into, exactly."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from operator import getitem
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.coupling.index_tracing import is_movement, moved_inputs, run_movement
from bmgraph.analysis.structure.partial_evaluation import FAILURES, MAX_ELEMENTS, PartialEvaluator
from bmgraph.analysis.structure.value_origins import stem
from bmgraph.ir.matching import equal_sizes
from bmgraph.ir.node_role import is_delta
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Dims, Kind
from bmgraph.ops.traits import is_elementwise, traits_of

LONGEST = 24
"""The most calls between a value and what gives its channels."""


@dataclass(frozen=True)
class ChannelSource:
    """What gives the channels of a value.

    `node`: a linear, a norm, or a product with a parameter. `channels`: i64[n], for each of the n channels (last axis) of the
    value, the channel of the node that it is. A channel of the node may be several of the value, as values of heads that
    share keys are; no other value reads one of these.
    """

    node: fx.Node
    channels: torch.Tensor


@dataclass(frozen=True)
class MixableSource:
    """What gives the channels of a value, up to movements and sums over rows, so that groups of its channels may be mixed by a matrix.

    `node`: a linear. `groups` i64[G, n]: the channels of the node that have the same weights in all such sums, in an order: those of a
    head whose values an attention mixes, or all. `blocks` i64[H, n]: the channels of the value in that order, for each time that a
    group is there (heads share values); `group` i64[H]: which one.
    """

    node: fx.Node
    groups: torch.Tensor
    blocks: torch.Tensor
    group: torch.Tensor


def factor_of(node: fx.Node) -> fx.Node | None:
    """The parameter in a product x * parameter[channels]; None for another call."""
    if traits_of(node).kind is not Kind.SCALING or node.meta["val"].dim() == 0:
        return None
    width = node.meta["val"].shape[-1]
    for item in node.args:
        if isinstance(item, fx.Node) and item.op == "get_attr" and list(item.meta["val"].shape) == [width]:
            return item
    return None


class ChannelSources:
    """Looks in the main graph of one program."""

    def __init__(self, program: Program) -> None:
        self._evaluator = PartialEvaluator(program)
        self._program = program

    def of(self, value: fx.Node) -> ChannelSource | str:
        """What gives the channels of a value, through calls that a positive factor of a channel passes through; or why
        nothing is found."""
        blocked = ""
        for path in _paths(value):
            found = self._followed(path)
            if isinstance(found, ChannelSource):
                return found
            blocked = blocked or found
        return blocked or f"no scale of its channels can be moved in front of {stem(value) or value.name}"

    def mixable(self, value: fx.Node) -> MixableSource | str:
        """The linear that gives the channels of a value, and which of these a matrix may mix; or why there is none."""
        blocked = ""
        for path in _paths(value, _mixable_operands):
            if traits_of(path[0]).kind is not Kind.LINEAR:
                continue
            found = self._followed(path)
            if isinstance(found, ChannelSource):
                return self._grouped(path, found.channels)
            blocked = blocked or found
        return (
            blocked or f"no linear gives it by movements and sums of rows alone ({stem(value) or value.name})"
        )

    def _grouped(self, path: list[fx.Node], channels: torch.Tensor) -> MixableSource | str:
        """The groups of channels with the same weights in the sum of rows that a path goes through."""
        sums = [
            place
            for place, node in enumerate(path)
            if traits_of(node).kind in (Kind.ATTENTION, Kind.BATCHED_PRODUCT)
        ]
        if not sums:
            numbers, size = torch.arange(len(channels)), len(channels)
        else:
            shape = self._evaluator.shape(path[sums[0]])
            heads, size = shape[-3] if len(shape) > 2 else 1, shape[-1]
            every = torch.arange(heads * size).reshape(heads, 1, size)
            labels = (every if len(shape) > 2 else every[0]).expand(shape).contiguous()
            for before, node in pairwise(path[sums[0] :]):
                found = self._through(node, before, labels)
                if found is None:
                    return f"its heads cannot be followed through {stem(node)}"
                labels = found
            numbers = labels.reshape(-1, labels.shape[-1])[0]
        order = numbers.argsort(stable=True)
        if len(order) % size or not torch.equal(numbers[order] % size, torch.arange(len(order)) % size):
            return "it does not hold whole heads"
        blocks = order.reshape(-1, size)
        rows = [tuple(row) for row in channels[blocks].tolist()]
        groups = list(dict.fromkeys(rows))
        flat = torch.tensor(groups).flatten()
        if len(set(flat.tolist())) != len(flat):
            return "its heads share a part of their values"
        return MixableSource(
            path[0], torch.tensor(groups), blocks, torch.tensor([groups.index(row) for row in rows])
        )

    def _followed(self, path: list[fx.Node]) -> ChannelSource | str:
        """What the first node of a path gives to the last one, each of whose channels must be one of the first."""
        shape = self._evaluator.shape(path[0])
        if torch.Size(shape).numel() > MAX_ELEMENTS:
            return f"{stem(path[0])} is too large to follow its channels"
        labels = [torch.arange(shape[-1]).expand(shape).contiguous()]
        for before, node in pairwise(path):
            found = self._through(node, before, labels[-1])
            if found is None:
                return f"the channels of {stem(path[0])} cannot be followed through {stem(node)}"
            labels.append(found)
        rows = labels[-1].reshape(-1, labels[-1].shape[-1])
        if rows.shape[0] == 0 or not bool((rows == rows[:1]).all()):
            return f"its channels are not those of {stem(path[0])}"
        channels = rows[0].clone()
        used = torch.zeros(shape[-1], dtype=torch.bool)
        used[channels] = True
        for place, (node, following) in enumerate(pairwise(path)):
            for reader in _readers(node):
                if reader is following:
                    continue
                moves = is_movement(reader) and not _reads_others(reader, node)
                seen = self._through(reader, node, labels[place]) if moves else None
                if seen is None or bool(used[seen].any()):
                    what = "the program returns" if reader.op == "output" else f"{stem(reader)} reads"
                    return f"{what} {stem(node)} too"
        return ChannelSource(path[0], channels)

    def _through(self, node: fx.Node, source: fx.Node, labels: torch.Tensor) -> torch.Tensor | None:
        """The channel of each element of a call, given those of the operand that it takes its channels from."""
        if traits_of(node).kind in (Kind.ATTENTION, Kind.BATCHED_PRODUCT):
            return self._mixed(node, labels)
        if not is_movement(node):
            return labels

        def value(item: fx.Node) -> Any:
            return labels if item is source else self._evaluator.size(item.meta["val"])

        try:
            moved = run_movement(node, value)
        except FAILURES:
            return None
        return moved if isinstance(moved, torch.Tensor) else None

    def _mixed(self, node: fx.Node, labels: torch.Tensor) -> torch.Tensor | None:
        """Through a weighted sum of rows: [..., T, e] -> [..., S, e], where all rows have the same channels."""
        if not bool((labels == labels[..., :1, :]).all()):
            return None
        row, shape = labels[..., :1, :], self._evaluator.shape(node)
        if row.dim() >= 3 and len(shape) == row.dim() and row.shape[-3] not in (1, shape[-3]):
            if shape[-3] % row.shape[-3]:
                return None
            row = row.repeat_interleave(shape[-3] // row.shape[-3], -3)  # heads share values
        try:
            return row.expand(shape)
        except RuntimeError:
            return None


def _paths(
    value: fx.Node, operands: Callable[[fx.Node], list[fx.Node]] | None = None
) -> Iterator[list[fx.Node]]:
    """Paths from something with weights for each channel to a value, the shortest first, through the given operands of calls."""
    operands = operands or _operands
    waiting, seen = deque([[value]]), {value}
    while waiting:
        path = waiting.popleft()
        node = path[0]
        if is_delta(node):
            continue
        if traits_of(node).kind is Kind.LINEAR or traits_of(node).dims is Dims.NORMED or factor_of(node):
            yield path
        for operand in operands(node):
            if operand not in seen and len(path) < LONGEST:
                seen.add(operand)
                waiting.append([operand, *path])


def _operands(node: fx.Node) -> list[fx.Node]:
    """The operands of a call any of which, scaled by positive factors of its channels, scales the result alike."""
    if node.op != "call_function" or not _is_float(node):
        return []
    row, args = traits_of(node), node.args
    if row.kind is Kind.ATTENTION:
        found: list[Any] = [args[2]]
    elif row.kind is Kind.BATCHED_PRODUCT:
        found = [args[row.factors[1]]] if row.dims is Dims.MATMUL else []
    elif is_movement(node):
        moved = moved_inputs(node)
        found = moved if len(moved) == 1 and not _reads_others(node, moved[0]) else []
    elif row.kind is Kind.SCALING:
        found = [item for item in args if _same_shape(item, node)]
    elif row.kind is Kind.QUOTIENT:
        found = [item for item in args[:1] if _same_shape(item, node)]
    elif row.kind in (Kind.DROPOUT, Kind.CAST) or row.homogeneous or (row.linear and is_elementwise(node)):
        found = list(args[:1])
    else:
        found = []
    return [
        item for item in found if isinstance(item, fx.Node) and _is_float(item) and _times(node, item) == 1
    ]


def _mixable_operands(node: fx.Node) -> list[fx.Node]:
    """The operands of a call that, multiplied by a matrix along its channels, multiply the result alike, as far as heads allow."""
    row = traits_of(node)
    if row.homogeneous:
        return []
    if row.kind in (Kind.SCALING, Kind.QUOTIENT):
        values = [item for item in node.args if isinstance(item, fx.Node) and _is_tensor(item)]
        return values if len(values) == 1 and values[0] is node.args[0] and _is_float(node) else []
    return _operands(node)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0


def _times(node: fx.Node, item: fx.Node) -> int:
    """How often a call reads a value: x * x scales by the square of a factor."""
    found: list[fx.Node] = []
    call: Any = node.args[0] if node.target is getitem else node
    fx.node.map_arg((call.args, call.kwargs), found.append)
    return found.count(item)


def _reads_others(node: fx.Node, source: fx.Node) -> bool:
    """Whether a movement reads another tensor, such as indices."""
    call: Any = node.args[0] if node.target is getitem else node
    inputs = call.all_input_nodes
    return any(item is not source and isinstance(item.meta["val"], torch.Tensor) for item in inputs)


def _same_shape(item: object, node: fx.Node) -> bool:
    if not isinstance(item, fx.Node) or not isinstance(item.meta.get("val"), torch.Tensor):
        return False
    mine, other = item.meta["val"].shape, node.meta["val"].shape
    return len(mine) == len(other) and all(map(equal_sizes, mine, other))


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a value; of a split its parts."""
    for user in node.users:
        if traits_of(user).kind is Kind.SPLIT:
            yield from user.users
        else:
            yield user
