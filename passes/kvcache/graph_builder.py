"""What the new graph is built with: the values that are there already, and the cache's own calls."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from bmgraph.ir.cache_spec import PAST_PREFIX
from bmgraph.ir.node_role import PROMPT
from bmgraph.ir.shape_inference import carry
from bmgraph.passes.kvcache.prompt_prefix import PREFIX, SEQUENCE, length_of
from bmgraph.passes.kvcache.sequence_roles import Sides, expression, is_size

aten = torch.ops.aten

LONGEST = 2**63 - 1
"""Where a slice ends that takes all that follows."""

NEW, ALL, ONE = "new", "all", "one"
"""What a size of the sequence becomes: S new positions, all P + S, or the last one."""


class Builder:
    """A new graph beside the old one: `new` are its nodes by the old ones that they stand for, `pasts` the inputs of the
    cache by name, `prefixes` the keys and values of a prompt in front of it, `past` the number of positions in both.
    What is made stands where `like`, an old node, stands."""

    def __init__(self, old: fx.Graph, sides: Sides, by: str, prefix: Mapping[str, torch.Tensor]) -> None:
        self.graph = fx.Graph()
        self.sides = sides
        self.new: dict[fx.Node, fx.Node] = {}
        self.like = sides.logits
        self._by = by
        self._sizes: dict[tuple[fx.Node, str], Any] = {}
        self._axes = {
            expression(size): (node, axis)
            for node in (*reversed(list(sides.memories)), sides.tokens)
            for axis, size in enumerate(node.meta["val"].shape)
            if sides.symbol not in getattr(expression(size), "free_symbols", {sides.symbol})
        }
        self._made: dict[tuple[Any, ...], fx.Node] = {}
        for node in old.nodes:
            if node.op in ("get_attr", "placeholder") and node not in sides.encoder:
                self.new[node] = self.graph.node_copy(node, lambda item: self.new[item])
                self.new[node].meta = without_value(node)
        self.new |= {node: self.graph.placeholder(name) for node, name in sides.memories.items()}
        self.pasts = {name: self.graph.placeholder(PAST_PREFIX + name) for name in sides.cached.values()}
        self.prefixes = {name: self._get_prefix(name) for name in prefix}
        self._count: dict[str, Any] = {NEW: self.call(aten.sym_size.int, self.new[sides.tokens], 1), ONE: 1}
        self.past = self.call(aten.sym_size.int, next(iter(self.pasts.values())), SEQUENCE)
        if prefix:
            self.past = self.call(operator.add, self.past, length_of(prefix))
            for mask in sides.masks:
                self.new[mask] = self._lengthened(self.new[mask], length_of(prefix))
        self._count[ALL] = self.call(operator.add, self.past, self._count[NEW])

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of the cache's own."""
        node = self.graph.call_function(target, args, kwargs)
        carry(self.like, node)
        node.meta["part"], node.meta["pass"] = "cache", self._by
        return node

    def _get_prefix(self, name: str) -> fx.Node:
        node = self.graph.get_attr(PREFIX + name)
        carry(self.like, node)
        node.meta["part"], node.meta["pass"] = PROMPT, self._by
        return node

    def _lengthened(self, mask: fx.Node, tokens: int) -> fx.Node:
        """A mask [B, n] of the text with ones for a prompt in front."""
        ones = self.call(aten.ones_like.default, self.call(aten.slice.Tensor, mask, 1, 0, 1))
        wide = self.call(aten.expand.default, ones, [-1, tokens])
        return self.call(aten.cat.default, [wide, mask], 1)

    def kept(self, name: str, made: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The cache with new keys or values, as it is given back and, behind those of a prompt, as it is read."""
        present = self.call(aten.cat.default, [self.pasts[name], made], SEQUENCE)
        if name not in self.prefixes:
            return present, present
        rows = self.call(aten.sym_size.int, made, 0)
        prefix = self.call(aten.expand.default, self.prefixes[name], [rows, -1, -1, -1])
        return present, self.call(aten.cat.default, [prefix, self.pasts[name], made], SEQUENCE)

    def behind(self, value: fx.Node, axis: int) -> fx.Node:
        """The new positions of something that has all."""
        return self.call(aten.slice.Tensor, value, axis, self.past, LONGEST)

    def once(self, key: tuple[Any, ...], make: Callable[[], fx.Node]) -> fx.Node:
        """What was made under a key before, or is made now."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def count(self, which: str) -> Any:
        """The number of positions that are NEW, ALL or ONE."""
        return self._count[which]

    def size(self, node: fx.Node, which: str) -> Any:
        """A size of the old graph, with that many positions where it has to do with them."""
        which = which if self.sides.sized(node) else ""
        if (node, which) not in self._sizes:
            found = expression(node.meta["val"])
            if which and found == self.sides.symbol:
                self._sizes[node, which] = self.count(which)
            elif found in self._axes:
                value, axis = self._axes[found]
                self._sizes[node, which] = self.call(aten.sym_size.int, self.new[value], axis)
            else:
                args = fx.map_arg(
                    node.args, lambda item: self.size(item, which) if is_size(item) else self.new[item]
                )
                assert callable(node.target)
                self._sizes[node, which] = self.call(node.target, *args, **node.kwargs)
        return self._sizes[node, which]


def without_value(node: fx.Node) -> dict[str, Any]:
    """What is known of a node but for its value, whose shape is another now."""
    return {key: item for key, item in node.meta.items() if key != "val"}
