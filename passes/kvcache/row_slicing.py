"""The rows of new tokens of what is known of all positions.

Taking rows is pushed up through what computes each position alone, to `arange` and the masks: then little is computed
for positions that were seen before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.value_origins import CASTS, stem
from bmgraph.errors import PassError
from bmgraph.passes.kvcache.graph_builder import ALL, Builder, without_value
from bmgraph.passes.kvcache.sequence_roles import Side, is_size

aten = torch.ops.aten

UNTAGGED = frozenset(
    {"__and__", "__or__", "__xor__", "where", "masked_fill", "zeros_like", "ones_like", "full_like"}
)
"""Calls that compute each element alone, though torch does not say so."""


class Rows:
    """Takes rows in the new graph of a builder."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder
        self._sides = builder.sides

    def of_queries(self, item: fx.Node) -> fx.Node:
        """What stands beside scores [..., P + S, P + S]: the rows of new queries."""
        rank = item.meta["val"].dim()
        if rank < 2 or rank - 2 not in self._sides.axes(item):
            return self._builder.new[item]
        return self._last(item, rank - 2)

    def of_tokens(self, item: fx.Node) -> fx.Node:
        """What meets tokens: the row of each new one, at its own position.

        Where a mask tells the padding that rows begin with, a token's position is the number of real ones before it.
        Raises PassError where the axis of positions cannot be told.
        """
        axes = self._sides.axes(item)
        if not axes and not self._sides.sized(item):
            return self._builder.new[item]
        if len(axes) != 1:
            raise PassError(f"in {place(item)} positions meet tokens in a way that a cache cannot follow")
        if item in self._sides.masked or not self._sides.masks:
            return self._last(item, axes[0])
        return self._builder.once((item, "at"), lambda: self._spread(self._at(item, axes[0]), axes[0]))

    def lower(self) -> fx.Node:
        """bool[S, P + S]: the keys that a query sees which sees no later one."""
        builder = self._builder

        def make() -> fx.Node:
            places = builder.call(aten.arange.default, builder.count(ALL))
            mine = builder.call(aten.unsqueeze.default, builder.behind(places, 0), 1)
            return builder.call(aten.ge.Tensor, mine, places)

        return builder.once(("lower",), make)

    def _last(self, item: fx.Node, axis: int) -> fx.Node:
        """The last S of all positions along an axis."""

        def make() -> fx.Node:
            sources = self._sources(item, axis)
            if sources is None:
                return self._builder.behind(self._builder.new[item], axis)
            args: list[Any] = list(item.args)
            if stem(item) == "expand":  # -1: as many as there are
                args[1] = [-1 if at == axis else size for at, size in enumerate(args[1])]
            taken = {source: self._last(source, at) for source, at in sources.items()}
            return self._again(item, taken, args)

        return self._builder.once((item, axis, "last"), make)

    def _at(self, item: fx.Node, axis: int) -> fx.Node:
        """[B, S, ...]: the rows at the tokens' positions; what stands before the axis is 1 and goes, what stands behind it
        stays."""

        def make() -> fx.Node:
            if item.target is aten.arange.default:
                return self._positions()
            sources = self._sources(item, axis)
            if sources is not None and self._is_alone(item, axis, sources):
                taken = {source: self._at(source, at) for source, at in sources.items()}
                if stem(item) == "expand" or (stem(item) == "unsqueeze" and _axis(item, 1) <= axis):
                    return taken[item.args[0]]  # type: ignore[index]
                args: list[Any] = list(item.args)
                if stem(item) in ("unsqueeze", "cat"):  # counted from the end: rows of a batch come in front
                    args[1] = _axis(item, 1) - item.meta["val"].dim()
                return self._again(item, taken, args)
            return self._picked(item, axis)

        return self._builder.once((item, axis, "at"), make)

    def _picked(self, item: fx.Node, axis: int) -> fx.Node:
        """Rows picked from a table of all positions."""
        if any(not isinstance(size, int) or size != 1 for size in item.meta["val"].shape[:axis]):
            raise PassError(
                f"in {place(item)} positions are bound to the rows of a batch: a cache cannot follow"
            )
        table = self._builder.new[item]
        for _ in range(axis):
            table = self._builder.call(aten.select.int, table, 0, 0)
        return self._builder.call(aten.index.Tensor, table, [self._positions()])

    def _spread(self, taken: fx.Node, axis: int) -> fx.Node:
        """[B, S, ...] with the axis of positions where it was."""
        for _ in range(axis - 1):
            taken = self._builder.call(aten.unsqueeze.default, taken, 1)
        return taken

    def _positions(self) -> fx.Node:
        """i64[B, S]: how many real tokens come before each new one."""
        builder = self._builder

        def make() -> fx.Node:
            counted = builder.call(aten.to.dtype, builder.new[self._sides.masks[0]], torch.int64)
            place = builder.call(aten.sub.Tensor, builder.call(aten.cumsum.default, counted, 1), 1)
            return builder.call(aten.clamp.default, builder.behind(place, 1), 0)

        return builder.once(("positions",), make)

    def _sources(self, item: fx.Node, axis: int) -> dict[fx.Node, int] | None:
        """The arguments that an axis comes from, and their axes; None where a call is not known to compute each position
        alone."""
        if item.op != "call_function" or self._sides.side[item] is not Side.PLACES:
            return None
        name, rank = stem(item), item.meta["val"].dim()
        source: Any = item.args[0] if item.args else None
        found: dict[fx.Node, int] = {}
        if name == "unsqueeze":
            found = {source: axis - (_axis(item, 1) < axis)}
        elif name == "embedding":
            found = {item.args[1]: axis}  # type: ignore[dict-item]
        elif name == "permute":
            found = {source: item.args[1][axis] % rank}  # type: ignore[index,operator]
        elif name == "cat" and _axis(item, 1) != axis:
            found = dict.fromkeys(source, axis)
        elif name in CASTS or name == "expand" or _is_pointwise(item):
            for argument in item.all_input_nodes:
                if isinstance(argument.meta["val"], torch.Tensor):
                    found[argument] = axis - (rank - argument.meta["val"].dim())
        found = {node: at for node, at in found.items() if at in self._sides.axes(node)}
        return found or None

    def _is_alone(self, item: fx.Node, axis: int, sources: dict[fx.Node, int]) -> bool:
        """Whether what else a call reads stands behind the axis, so that rows of a batch may be put before it."""
        behind = item.meta["val"].dim() - 1 - axis
        others = [
            node
            for node in item.all_input_nodes
            if node not in sources and not is_size(node) and stem(item) != "embedding"
        ]
        if stem(item) in ("permute", "cat") and others:
            return False
        if stem(item) == "expand":
            old, new = item.args[0].meta["val"].shape, item.meta["val"].shape  # type: ignore[union-attr]
            return behind == 0 or tuple(old[-behind:]) == tuple(new[-behind:])
        return stem(item) != "permute" and all(node.meta["val"].dim() <= behind for node in others)

    def _again(self, item: fx.Node, taken: dict[fx.Node, fx.Node], args: list[Any]) -> fx.Node:
        """A call of the old graph, with other arguments, on rows that were taken."""

        def argument(node: fx.Node) -> Any:
            if is_size(node):
                return self._builder.size(node, ALL)
            return taken.get(node, self._builder.new[node])

        made = self._builder.graph.create_node(
            "call_function",
            item.target,
            tuple(fx.map_arg(args, argument)),
            dict(fx.map_arg(item.kwargs, argument)),
            item.name,
        )
        made.meta = without_value(item)
        return made


def place(node: fx.Node) -> str:
    """Where a node stands in the model, for messages."""
    return str(node.meta.get("scope") or node.name)


def _axis(item: fx.Node, argument: int) -> int:
    """A call's axis, counted from the front of its result; 0 where it is not said."""
    axis: Any = item.args[argument] if len(item.args) > argument else 0
    return int(axis % item.meta["val"].dim())


def _is_pointwise(item: fx.Node) -> bool:
    target = item.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in target.tags or stem(item) in UNTAGGED
    )
