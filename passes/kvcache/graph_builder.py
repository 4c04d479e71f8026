"""Creates the nodes of the cached graph: inputs, sizes, cache reads and appends."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.token_values import SEQUENCE_AXIS, is_size
from bmgraph.ir.matching import END
from bmgraph.ir.node_role import KEY, NodeRole
from bmgraph.ir.shape_inference import carry, expression
from bmgraph.passes.kvcache.input_names import PAST_PREFIX, SCORED
from bmgraph.passes.kvcache.prompt_prefix import PARAMETER_PREFIX, USED, Front
from bmgraph.passes.kvcache.sequence_roles import SequenceRoles

aten = torch.ops.aten

NEW, ALL, SCORES = "new", "all", "scores"
"""The positions that a sequence size counts: the S new ones, all P + S, or those to score."""


class Builder:
    """A cached graph under construction, beside the old graph.

    `new` maps nodes of the old graph to their copies, `pasts` names to the cache inputs, `prefixes` names to the keys and
    values of a soft prompt. `past` is the number of positions in prefix and cache together. New calls take the metadata
    of `like`, a node of the old graph.
    """

    def __init__(self, old: fx.Graph, roles: SequenceRoles, by: str, front: Front) -> None:
        self.graph = fx.Graph()
        self.roles = roles
        self.new: dict[fx.Node, fx.Node] = {}
        self.like = roles.logits
        self._by = by
        self._sizes: dict[tuple[fx.Node, str], Any] = {}
        self._size_sources = {
            expression(size): (node, axis)
            for node in (*reversed(list(roles.memories)), roles.tokens)
            for axis, size in enumerate(node.meta["val"].shape)
            if roles.symbol not in getattr(expression(size), "free_symbols", {roles.symbol})
        }
        self._memo: dict[tuple[Any, ...], fx.Node] = {}
        for node in old.nodes:
            if node.op in ("get_attr", "placeholder") and node not in roles.independent:
                self.new[node] = self.graph.node_copy(node, lambda item: self.new[item])
                self.new[node].meta = without_value(node)
        self.new |= {node: self.graph.placeholder(name) for node, name in roles.memories.items()}
        self.pasts = {name: self.graph.placeholder(PAST_PREFIX + name) for name in roles.cached.values()}
        self.scored = self.graph.placeholder(SCORED)
        self._front = front
        self._choice = next((self.new[node] for node in self.new if node.target == front.choice), None)
        self.prefixes = {name: self._add_prefix(name) for name in front.values}
        self._counts: dict[str, Any] = {NEW: self.call(aten.sym_size.int, self.new[roles.tokens], 1)}
        self.past = self.call(aten.sym_size.int, next(iter(self.pasts.values())), SEQUENCE_AXIS)
        if front.values:
            self.past = self.call(operator.add, self.past, front.length)
            used = self._used()
            for mask in roles.masks:
                self.new[mask] = self._prepend_ones(mask, front.length, used)
            for positions in roles.position_inputs:
                counts = front.length if used is None else self._counted(used, positions)
                self.new[positions] = self.call(aten.add.Tensor, self.new[positions], counts)
        self._counts[ALL] = self.call(operator.add, self.past, self._counts[NEW])

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call that belongs to the cache, with the metadata of `like`."""
        node = self.graph.call_function(target, args, kwargs)
        carry(self.like, node)
        node.meta[KEY], node.meta["pass"] = NodeRole.CACHE, self._by
        return node

    def _add_prefix(self, name: str) -> fx.Node:
        """The keys or values in front: for all rows, or those that each chooses."""
        node = self._read(PARAMETER_PREFIX + name, self._front.roles.get(name, NodeRole.PROMPT))
        if self._choice is None:
            return node
        chosen = self.call(aten.index_select.default, node, 0, self._choice)
        chosen.meta["site"] = self._front.paths.get(name, "")
        return chosen

    def _read(self, name: str, role: str) -> fx.Node:
        node = self.graph.get_attr(name)
        carry(self.like, node)
        node.meta[KEY], node.meta["pass"] = role, self._by
        return node

    def _used(self) -> fx.Node | None:
        """Which positions in front each row uses, ones and zeros [B, n]; None where all rows use all."""
        if self._choice is None:
            return None
        table = self._read(USED, self._front.used_role)
        chosen = self.call(aten.index_select.default, table, 0, self._choice)
        chosen.meta["site"] = str(self.roles.tokens.target)
        return chosen

    def _counted(self, used: fx.Node, positions: fx.Node) -> fx.Node:
        """How many positions each row has in front, [B, 1]."""
        marks = self.call(aten.to.dtype, used, positions.meta["val"].dtype)
        return self.call(aten.sum.dim_IntList, marks, [1], True)

    def _prepend_ones(self, node: fx.Node, length: int, used: fx.Node | None) -> fx.Node:
        """A mask [B, n] of the text as [B, length + n], with ones for the prompt in front, or for what a row uses of it."""
        mask = self.new[node]
        if used is not None:
            return self.call(
                aten.cat.default, [self.call(aten.to.dtype, used, node.meta["val"].dtype), mask], 1
            )
        ones = self.call(aten.ones_like.default, self.call(aten.slice.Tensor, mask, 1, 0, 1))
        prompt_mask = self.call(aten.expand.default, ones, [-1, length])
        return self.call(aten.cat.default, [prompt_mask, mask], 1)

    def append(self, name: str, new: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Append new keys or values to the cache: what the graph returns, and what attention reads (with the prefix)."""
        present = self.call(aten.cat.default, [self.pasts[name], new], SEQUENCE_AXIS)
        if name not in self.prefixes:
            return present, present
        prefix = self.prefixes[name]
        if self._choice is None:
            rows = self.call(aten.sym_size.int, new, 0)
            prefix = self.call(aten.expand.default, prefix, [rows, -1, -1, -1])
        return present, self.call(aten.cat.default, [prefix, self.pasts[name], new], SEQUENCE_AXIS)

    def new_positions(self, value: fx.Node, axis: int) -> fx.Node:
        """The slice of the new positions of a value that has all P + S."""
        return self.call(aten.slice.Tensor, value, axis, self.past, END)

    def scored_positions(self, value: fx.Node) -> fx.Node:
        """The positions to score of a value [B, S, ...] that has all new ones."""
        return self.call(aten.index_select.default, value, 1, self.scored)

    def memoize(self, key: tuple[object, ...], make: Callable[[], fx.Node]) -> fx.Node:
        """The node stored under a key, made at the first request."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def count(self, which: str) -> Any:
        """The number of positions that are NEW, ALL or to score."""
        if which == SCORES:
            return self.memoize((SCORES,), lambda: self.call(aten.sym_size.int, self.scored, 0))
        return self._counts[which]

    def size(self, node: fx.Node, which: str) -> Any:
        """A size of the old graph in the new one; if it depends on the sequence length, it counts the positions `which`."""
        which = which if self.roles.depends_on_length(node) else ""
        if (node, which) not in self._sizes:
            size = expression(node.meta["val"])
            if which and size == self.roles.symbol:
                self._sizes[node, which] = self.count(which)
            elif size in self._size_sources:
                source, axis = self._size_sources[size]
                self._sizes[node, which] = self.call(aten.sym_size.int, self.new[source], axis)
            else:
                args = fx.map_arg(
                    node.args, lambda item: self.size(item, which) if is_size(item) else self.new[item]
                )
                assert callable(node.target)
                self._sizes[node, which] = self.call(node.target, *args, **node.kwargs)
        return self._sizes[node, which]


def without_value(node: fx.Node) -> dict[str, object]:
    """A node's metadata except its value, whose shape changes."""
    return {key: item for key, item in node.meta.items() if key != "val"}
