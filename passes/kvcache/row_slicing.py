"""Takes the rows of the new tokens from values that are computed for all positions.

Slicing is pushed up through calls that compute each position alone, to `arange` and the masks, so that little is
computed for positions that are cached already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.analysis.token_values import is_size
from bmgraph.errors import PassError
from bmgraph.ops.trait_row import Dims, Kind
from bmgraph.ops.traits import calls, is_elementwise, traits_of
from bmgraph.passes.kvcache.graph_builder import ALL, Builder, without_value
from bmgraph.passes.kvcache.sequence_roles import SequenceRole

aten = torch.ops.aten


class RowSlicer:
    """Slices rows in the new graph of a builder; `item` is always a node of the old graph with all positions."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder
        self._roles = builder.roles

    def query_rows(self, item: fx.Node) -> fx.Node:
        """The rows [..., S, P + S] of the new queries of a mask or bias [..., P + S, P + S]."""
        rank = item.meta["val"].dim()
        if rank < 2 or rank - 2 not in self._roles.sequence_axes(item):
            return self._builder.new[item]
        return self._last_rows(item, rank - 2)

    def token_rows(self, item: fx.Node) -> fx.Node:
        """The row of each new token, at its own position.

        With a mask, rows may begin with padding, and a token's position is the number of real tokens before it.
        Raises PassError where it is unclear which axis is that of positions.
        """
        axes = self._roles.sequence_axes(item)
        if not axes and not self._roles.depends_on_length(item):
            return self._builder.new[item]
        if len(axes) != 1:
            raise PassError(
                f"in {_module_path(item)} tokens read a value of positions with {len(axes)} sequence axes: a KV cache "
                "supports one"
            )
        if item in self._roles.padding_aware or not self._roles.masks:
            return self._last_rows(item, axes[0])
        return self._builder.memoize(
            (item, "at"),
            lambda: _restore_axis(self._builder, self._rows_at_positions(item, axes[0]), axes[0]),
        )

    def causal_mask(self) -> fx.Node:
        """bool[S, P + S]: the keys up to each new query's own position."""
        builder = self._builder

        def make() -> fx.Node:
            positions = builder.call(aten.arange.default, builder.count(ALL))
            queries = builder.call(aten.unsqueeze.default, builder.new_positions(positions, 0), 1)
            return builder.call(aten.ge.Tensor, queries, positions)

        return builder.memoize(("causal_mask",), make)

    def _last_rows(self, item: fx.Node, axis: int) -> fx.Node:
        """The last S of all positions along an axis."""

        def make() -> fx.Node:
            sources = self._sources(item, axis)
            if sources is None:
                return self._builder.new_positions(self._builder.new[item], axis)
            args: list[Any] = list(item.args)
            if calls(item, aten.expand):  # -1 keeps the size of the sliced input
                args[1] = [-1 if dim == axis else size for dim, size in enumerate(args[1])]
            sliced = {source: self._last_rows(source, source_axis) for source, source_axis in sources.items()}
            return self._copy_call(item, sliced, args)

        return self._builder.memoize((item, axis, "last"), make)

    def _rows_at_positions(self, item: fx.Node, axis: int) -> fx.Node:
        """[B, S, ...]: the rows at the tokens' positions. Axes before `axis` have size 1 and are dropped, axes after it
        stay."""

        def make() -> fx.Node:
            if item.target is aten.arange.default:
                return self._token_positions()
            sources = self._sources(item, axis)
            if sources is None or not self._allows_batch_axis(item, axis, sources):
                return self._gather_rows(item, axis)
            sliced = {
                source: self._rows_at_positions(source, source_axis)
                for source, source_axis in sources.items()
            }
            if calls(item, aten.expand) or (calls(item, aten.unsqueeze) and _axis(item, 1) <= axis):
                return sliced[item.args[0]]  # type: ignore[index]
            args: list[Any] = list(item.args)
            if calls(
                item, aten.unsqueeze, aten.cat
            ):  # counted from the end, since a batch axis comes in front
                args[1] = _axis(item, 1) - item.meta["val"].dim()
            return self._copy_call(item, sliced, args)

        return self._builder.memoize((item, axis, "at"), make)

    def _gather_rows(self, item: fx.Node, axis: int) -> fx.Node:
        """Rows gathered from a table of all positions."""
        if any(not isinstance(size, int) or size != 1 for size in item.meta["val"].shape[:axis]):
            raise PassError(
                f"in {_module_path(item)} values of positions differ between the rows of a batch, but not by the mask: a "
                "KV cache cannot shift them for padding"
            )
        table = self._builder.new[item]
        for _ in range(axis):
            table = self._builder.call(aten.select.int, table, 0, 0)
        return self._builder.call(aten.index.Tensor, table, [self._token_positions()])

    def _token_positions(self) -> fx.Node:
        """i64[B, S]: the number of real tokens before each new one."""
        builder = self._builder

        def make() -> fx.Node:
            mask = builder.call(aten.to.dtype, builder.new[self._roles.masks[0]], torch.int64)
            positions = builder.call(aten.sub.Tensor, builder.call(aten.cumsum.default, mask, 1), 1)
            return builder.call(aten.clamp.default, builder.new_positions(positions, 1), 0)

        return builder.memoize(("positions",), make)

    def _sources(self, item: fx.Node, axis: int) -> dict[fx.Node, int] | None:
        """The arguments that an axis comes from, with their axes.

        None where the call is not known to compute each position alone.
        """
        if item.op != "call_function" or self._roles.role[item] is not SequenceRole.POSITIONS:
            return None
        rank = item.meta["val"].dim()
        source: Any = item.args[0] if item.args else None
        found: dict[fx.Node, int] = {}
        if calls(item, aten.unsqueeze):
            found = {source: axis - (_axis(item, 1) < axis)}
        elif traits_of(item).kind is Kind.EMBEDDING:
            found = {item.args[1]: axis}  # type: ignore[dict-item]
        elif calls(item, aten.permute):
            found = {source: item.args[1][axis] % rank}  # type: ignore[index,operator]
        elif calls(item, aten.cat) and _axis(item, 1) != axis:
            found = dict.fromkeys(source, axis)
        elif calls(item, aten.expand) or _is_pointwise(item):
            for argument in item.all_input_nodes:
                if isinstance(argument.meta["val"], torch.Tensor):
                    found[argument] = axis - (rank - argument.meta["val"].dim())
        found = {
            node: node_axis
            for node, node_axis in found.items()
            if node_axis in self._roles.sequence_axes(node)
        }
        return found or None

    def _allows_batch_axis(self, item: fx.Node, axis: int, sources: dict[fx.Node, int]) -> bool:
        """Whether the other arguments of a call only have axes after `axis`, so that a batch axis may come before it."""
        trailing = item.meta["val"].dim() - 1 - axis
        others = [
            node
            for node in item.all_input_nodes
            if node not in sources and not is_size(node) and traits_of(item).kind is not Kind.EMBEDDING
        ]
        if calls(item, aten.permute, aten.cat) and others:
            return False
        if calls(item, aten.expand):
            old, new = item.args[0].meta["val"].shape, item.meta["val"].shape  # type: ignore[union-attr]
            return trailing == 0 or tuple(old[-trailing:]) == tuple(new[-trailing:])
        return not calls(item, aten.permute) and all(node.meta["val"].dim() <= trailing for node in others)

    def _copy_call(self, item: fx.Node, sliced: dict[fx.Node, fx.Node], args: list[Any]) -> fx.Node:
        """A call of the old graph with the arguments `args`, on sliced rows where there are some."""

        def argument(node: fx.Node) -> Any:
            if is_size(node):
                return self._builder.size(node, ALL)
            return sliced.get(node, self._builder.new[node])

        copied = self._builder.graph.create_node(
            "call_function",
            item.target,
            tuple(fx.map_arg(args, argument)),
            dict(fx.map_arg(item.kwargs, argument)),
            item.name,
        )
        copied.meta = without_value(item)
        return copied


def _restore_axis(builder: Builder, rows: fx.Node, axis: int) -> fx.Node:
    """Rows [B, S, ...] as [B, 1, ..., S, ...], with the positions at `axis`."""
    for _ in range(axis - 1):
        rows = builder.call(aten.unsqueeze.default, rows, 1)
    return rows


def _module_path(node: fx.Node) -> str:
    """Where a node is in the model, for messages."""
    return str(node.meta.get("scope") or node.name)


def _axis(item: fx.Node, argument: int) -> int:
    """The axis that an argument of a call names, counted from the front of the result; 0 where it is left out."""
    axis: Any = item.args[argument] if len(item.args) > argument else 0
    return int(axis % item.meta["val"].dim())


def _is_pointwise(item: fx.Node) -> bool:
    """Whether a call computes each element from those in its place, or from the sizes alone."""
    return is_elementwise(item) or traits_of(item).dims is Dims.SIZES_ALONE
