"""A loss that reads some rows of what a linear gives, such as the logits at a mask: the rows are selected in front of it.

A language head over 49,152 words takes a fifth of a small model's time, and its results with their gradients most of the memory of
a step; a task that reads one position of each text pays for all of them. Selecting rows and multiplying by a weight commute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from bmgraph.ir.program import Program, copy_graph, output_node
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of
from bmgraph.training.row_axes import LossGraph

aten = torch.ops.aten

MOST_SELECTIONS = 4
"""By how many selections a loss may read a head."""


@dataclass(frozen=True)
class Head:
    """The output of a program that a linear gives: the number of the output, the linear, and behind it, in order, selections of rows
    (a soft prompt's are dropped) and casts."""

    output: int
    linear: fx.Node
    behind: tuple[fx.Node, ...] = ()

    @property
    def operands(self) -> list[fx.Node]:
        """Its input, its weight and, if it has one, its bias."""
        return [node for node in self.linear.args if isinstance(node, fx.Node)]


def heads_of(program: Program) -> list[Head]:
    """The outputs that linears give."""
    found = []
    returned: Any = output_node(program.graph).args[0]
    for number, node in enumerate(returned[: len(program.outputs)]):
        behind: list[fx.Node] = []
        while _is_cast(node) or _drops_rows(node):
            behind.insert(0, node)
            node = node.args[0]
        if traits_of(node).kind is Kind.LINEAR and node.meta["val"].dim() > 2:
            found.append(Head(number, node, tuple(behind)))
    return found


def _is_cast(node: fx.Node) -> bool:
    return node.target is aten.to.dtype


def _drops_rows(node: fx.Node) -> bool:
    """Whether a call keeps a constant range of an axis that is not the last one."""
    if node.target is not aten.slice.Tensor or not all(isinstance(item, int) for item in node.args[1:]):
        return False
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    return not node.kwargs and axis % node.meta["val"].dim() != node.meta["val"].dim() - 1


def with_operands(program: Program, heads: Sequence[Head]) -> fx.Graph:
    """A copy of the program's graph that returns the operands of heads behind all else."""
    copied = copy_graph(program.graph)
    copies = {node.name: node for node in copied.nodes}
    output = output_node(copied)
    returned: Any = output.args[0]
    extra = [copies[node.name] for head in heads for node in head.operands]
    output.args = ((*returned, *extra),)
    return copied


def only_selected(loss: LossGraph, heads: Sequence[Head]) -> list[Head]:
    """The heads of whose results a loss reads nothing but rows."""
    places = [node for node in loss.module.graph.nodes if node.op == "placeholder"]
    return [head for head in heads if _is_selected(places[head.output])]


class LazyHead:
    """Stands for what a head gives while a loss function runs: rows are selected in front of it, anything else computes it whole.

    No tensor, since it would have values; what asks for the type of its arguments gets the whole results instead.
    """

    def __init__(self, head: Head, x: torch.Tensor, operands: Sequence[torch.Tensor]) -> None:
        self._operands = operands
        self._casts: list[Any] = [node.args[1] for node in head.behind if _is_cast(node)]
        for node in head.behind:
            if not _is_cast(node):
                x = aten.slice.Tensor(x, *node.args[1:])
        self._x = x

    @cached_property
    def whole(self) -> torch.Tensor:
        """All rows; what only asks for sizes leaves no call behind."""
        return self._of(self._x)

    def _of(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = aten.linear.default(x, *self._operands)
        for dtype in self._casts:
            found = found.to(dtype)
        return found

    def gather(self, axis: int, index: torch.Tensor) -> torch.Tensor:
        """As of torch: where the index is one for all features, of the head's input."""
        words = self._operands[0].shape[0]
        if not self._is_row(axis) or index.stride(-1) != 0 or index.shape[-1] != words:
            return self.whole.gather(axis, index)
        return self._of(self._x.gather(axis, index[..., :1].expand(*index.shape[:-1], self._x.shape[-1])))

    def select(self, axis: int, index: int) -> torch.Tensor:
        """As of torch."""
        return self._of(self._x.select(axis, index)) if self._is_row(axis) else self.whole.select(axis, index)

    def index_select(self, axis: int, index: torch.Tensor) -> torch.Tensor:
        """As of torch."""
        rows = self._is_row(axis)
        return self._of(self._x.index_select(axis, index)) if rows else self.whole.index_select(axis, index)

    def __getitem__(self, key: Any) -> torch.Tensor:
        items = key if isinstance(key, tuple) else (key,)
        taken = sum(item.dim() if _is_mask(item) else 1 for item in items)
        plain = all(isinstance(item, (int, slice, torch.Tensor)) for item in items)
        return self._of(self._x[key]) if plain and taken < self._x.dim() else self.whole[key]

    def _is_row(self, axis: int) -> bool:
        return axis % self._x.dim() != self._x.dim() - 1

    def __len__(self) -> int:
        return len(self.whole)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if (
            func in (torch.gather, torch.select, torch.index_select)
            and not given
            and isinstance(args[0], cls)
        ):
            return getattr(args[0], func.__name__)(*args[1:])
        args, given = fx.node.map_aggregate((tuple(args), given), _whole)
        return func(*args, **given)


def _whole(item: Any) -> Any:
    return item.whole if isinstance(item, LazyHead) else item


def _is_mask(item: Any) -> bool:
    return isinstance(item, torch.Tensor) and item.dtype in (torch.bool, torch.uint8)


def selecting_first(call: Callable[..., Any], heads: Sequence[Head]) -> Callable[..., Any]:
    """The loss as a function (outputs, inputs, operands of each head) that selects rows in front of heads."""

    def selecting(outputs: dict[str, Any], inputs: dict[str, Any], operands: Sequence[Sequence[Any]]) -> Any:
        names = list(outputs)
        lazy = {names[head.output]: LazyHead(head, own[0], own[1:]) for head, own in zip(heads, operands)}
        try:
            return call({**outputs, **lazy}, inputs)
        except (TypeError, AttributeError):  # it asks what its arguments are
            return call({**outputs, **{name: item.whole for name, item in lazy.items()}}, inputs)

    return selecting


def _is_selected(place: fx.Node) -> bool:
    """Whether a value is read by selections of rows alone: at least one, and few, since several may read the same rows."""
    last, found = place.meta["val"].dim() - 1, 0
    for node in place.users:
        if node.target is not aten.sym_size.int:
            if node.args[0] is not place or not _selects_rows(node, last):
                return False
            found += 1
    return 0 < found <= MOST_SELECTIONS


def _selects_rows(node: fx.Node, last: int) -> bool:
    """Whether a call picks whole rows (all of the last axis) of its first operand."""
    if node.target is aten.index.Tensor:
        return len(node.args[1]) <= last and None not in node.args[1]  # type: ignore[arg-type, operator]
    axis = node.args[1] if len(node.args) > 1 else 0
    if not isinstance(axis, int) or axis % (last + 1) == last:
        return False
    if node.target is aten.gather.default:
        index: Any = node.args[2]
        return index.target is aten.expand.default and index.args[0].meta["val"].shape[-1] == 1
    return node.target in (aten.select.int, aten.slice.Tensor, aten.index_select.default)
