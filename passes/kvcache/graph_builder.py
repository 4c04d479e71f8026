"""Creates the nodes of the cached graph: inputs, sizes, cache reads and appends."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.token_values import SEQUENCE_AXIS, is_size
from bmgraph.ir.matching import END
from bmgraph.ir.node_role import KEY, NodeRole
from bmgraph.ir.shape_inference import carry, expression
from bmgraph.passes.kvcache.input_names import PAST_PREFIX, SCORED
from bmgraph.passes.kvcache.prompt_prefix import PARAMETER_PREFIX, prefix_length
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

    def __init__(
        self, old: fx.Graph, roles: SequenceRoles, by: str, prefix: Mapping[str, torch.Tensor]
    ) -> None:
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
        self.prefixes = {name: self._add_prefix(name) for name in prefix}
        self._counts: dict[str, Any] = {NEW: self.call(aten.sym_size.int, self.new[roles.tokens], 1)}
        self.past = self.call(aten.sym_size.int, next(iter(self.pasts.values())), SEQUENCE_AXIS)
        if prefix:
            self.past = self.call(operator.add, self.past, prefix_length(prefix))
            for mask in roles.masks:
                self.new[mask] = self._prepend_ones(self.new[mask], prefix_length(prefix))
        self._counts[ALL] = self.call(operator.add, self.past, self._counts[NEW])

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call that belongs to the cache, with the metadata of `like`."""
        node = self.graph.call_function(target, args, kwargs)
        carry(self.like, node)
        node.meta[KEY], node.meta["pass"] = NodeRole.CACHE, self._by
        return node

    def _add_prefix(self, name: str) -> fx.Node:
        node = self.graph.get_attr(PARAMETER_PREFIX + name)
        carry(self.like, node)
        node.meta[KEY], node.meta["pass"] = NodeRole.PROMPT, self._by
        return node

    def _prepend_ones(self, mask: fx.Node, length: int) -> fx.Node:
        """A mask [B, n] of the text as [B, length + n], with ones for the prompt in front."""
        ones = self.call(aten.ones_like.default, self.call(aten.slice.Tensor, mask, 1, 0, 1))
        prompt_mask = self.call(aten.expand.default, ones, [-1, length])
        return self.call(aten.cat.default, [prompt_mask, mask], 1)

    def append(self, name: str, new: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Append new keys or values to the cache: what the graph returns, and what attention reads (with the prefix)."""
        present = self.call(aten.cat.default, [self.pasts[name], new], SEQUENCE_AXIS)
        if name not in self.prefixes:
            return present, present
        rows = self.call(aten.sym_size.int, new, 0)
        prefix = self.call(aten.expand.default, self.prefixes[name], [rows, -1, -1, -1])
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
