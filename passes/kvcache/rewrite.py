"""The graph of a decoder, built again with a cache: new tokens in, keys and values of all positions kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from bmgraph.passes.kvcache.graph_builder import ALL, LONGEST, NEW, ONE, Builder, without_value
from bmgraph.passes.kvcache.row_slicing import Rows
from bmgraph.passes.kvcache.sequence_roles import Side, Sides, is_size

aten = torch.ops.aten

MASK, CAUSAL = 3, 5
"""The places of the mask and of the flag `is_causal` among the arguments of scaled_dot_product_attention."""

COUNTED = {
    Side.TOKENS: NEW, Side.OTHER: NEW, Side.LAST: ONE, Side.PLACES: ALL, Side.KEYS: ALL,
}  # fmt: skip
"""How many positions a call of each side counts in its sizes."""


def attach(old: fx.Graph, sides: Sides, by: str, prefix: Mapping[str, torch.Tensor]) -> fx.Graph:
    """The new graph, which returns the last logits and then the cache with the new positions, in the order of
    `sides.cached`. `by` is stamped on what is new. `prefix` are keys and values that stand in front of the cache, and are
    no part of it."""
    copying = _Copying(Builder(old, sides, by, prefix))
    for node in old.nodes:
        if node.op == "call_function" and not is_size(node) and node not in sides.encoder:
            copying.copy(node)
    return copying.close()


class _Copying:
    """Copies the old graph call by call, each to the side that it belongs to."""

    def __init__(self, builder: Builder) -> None:
        self.presents: dict[str, fx.Node] = {}
        self._read_as: dict[str, fx.Node] = {}
        self._builder = builder
        self._sides = builder.sides
        self._rows = Rows(builder)
        self._attends = {core.node for core in builder.sides.cores}

    def copy(self, node: fx.Node) -> None:
        """A call, and the cache behind it where it is kept."""
        self._builder.like = node
        args, kwargs = self._arguments(node)
        made = self._builder.graph.create_node("call_function", node.target, args, kwargs, node.name)
        made.meta = without_value(node)
        self._builder.new[node] = made
        if node in self._sides.cached:
            name = self._sides.cached[node]
            self.presents[name], self._read_as[name] = self._builder.kept(name, made)

    def close(self) -> fx.Graph:
        """The graph with what it returns, and without what nothing needs any more."""
        logits = self._builder.new[self._sides.logits]
        if self._sides.side[self._sides.logits] is not Side.LAST:
            logits = self._builder.call(aten.slice.Tensor, logits, 1, -1, LONGEST)
        graph = self._builder.graph
        graph.output((logits, *(self.presents[name] for name in self._sides.cached.values())))
        graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        return graph

    def _arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = _mask(node)
        sizes = [item for item in node.all_input_nodes if is_size(item) and self._sides.sized(item)]

        def argument(item: fx.Node) -> Any:
            if is_size(item):
                return self._builder.size(item, self._counted(node, item, sizes))
            return self._read(node, item, item is mask)

        args = list(fx.map_arg(node.args, argument))
        kwargs = dict(fx.map_arg(node.kwargs, argument))
        if node in self._attends and _is_causal(node):
            args = [*args[:MASK], self._rows.lower(), args[MASK + 1] if len(args) > MASK + 1 else 0.0, False]
            kwargs.pop("is_causal", None)
        return tuple(args), kwargs

    def _read(self, node: fx.Node, item: fx.Node, is_mask: bool) -> fx.Node:
        """What a call reads for a value of the old graph."""
        side, origin = self._sides.side[node], self._sides.side[item]
        if (node, item) in self._sides.behind:
            return self._read_as[self._sides.cached[item]]
        if origin is Side.PLACES and (is_mask or side is Side.SCORES):
            return self._rows.of_queries(item)
        if origin is Side.PLACES and side in (Side.TOKENS, Side.LAST):
            return self._rows.of_tokens(item)
        if origin is Side.TOKENS and side is Side.LAST:
            call, new = self._builder.call, self._builder.new[item]
            return self._builder.once((item, ONE), lambda: call(aten.slice.Tensor, new, 1, -1, LONGEST))
        return self._builder.new[item]

    def _counted(self, node: fx.Node, item: fx.Node, sizes: list[fx.Node]) -> str:
        """Whether a size in a call counts new positions or all; beside scores the last one is that of the keys."""
        side = self._sides.side[node]
        if side is Side.SCORES:
            return ALL if item is sizes[-1] and len(sizes) > 1 else NEW
        return COUNTED[side]


def _mask(node: fx.Node) -> Any:
    """What hides keys in a fused attention; None for any other call."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return None
    return node.args[MASK] if len(node.args) > MASK else node.kwargs.get("attn_mask")


def _is_causal(node: fx.Node) -> bool:
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    return bool(node.args[CAUSAL] if len(node.args) > CAUSAL else node.kwargs.get("is_causal", False))
