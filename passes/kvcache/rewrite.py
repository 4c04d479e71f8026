"""Rewrites the graph of a decoder call by call: new tokens in, logits of the positions to score and appended cache out."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.analysis.token_values import is_size
from bmgraph.passes.kvcache.graph_builder import ALL, NEW, SCORES, Builder, without_value
from bmgraph.passes.kvcache.prompt_prefix import Front
from bmgraph.passes.kvcache.row_slicing import RowSlicer
from bmgraph.passes.kvcache.sequence_roles import SequenceRole, SequenceRoles

aten = torch.ops.aten

MASK, CAUSAL = 3, 5
"""Indices of the mask and of the flag `is_causal` among the arguments of scaled_dot_product_attention."""

COUNTED_POSITIONS = {
    SequenceRole.TOKENS: NEW, SequenceRole.OTHER: NEW, SequenceRole.SCORED: SCORES, SequenceRole.POSITIONS: ALL,
    SequenceRole.KEYS: ALL,
}  # fmt: skip
"""Role of a call -> the positions that sequence sizes in its arguments count."""


def build_cached_graph(old: fx.Graph, roles: SequenceRoles, by: str, front: Front) -> fx.Graph:
    """The new graph. It returns the logits to score and then the cache with the new positions, in the order of `roles.cached`.

    `by` is the text of the pass, recorded on new nodes. `front` holds the keys and values of a soft prompt: attention
    reads them in front of the cache, and the returned cache does not contain them.
    """
    copier = _GraphCopier(Builder(old, roles, by, front))
    needed = _needed(roles)
    for node in old.nodes:
        if node in needed and node.op == "call_function" and not is_size(node):
            copier.copy(node)
    return copier.finish()


def _needed(roles: SequenceRoles) -> set[fx.Node]:
    """What logits and cached values are computed from, up to what does not depend on tokens: other outputs of the program, such as
    what an encoder returns, may be made of sizes that the decoder does not have."""
    found: set[fx.Node] = set()
    stack = [roles.logits, *roles.cached]
    while stack:
        node = stack.pop()
        if node not in found and node not in roles.independent:
            found.add(node)
            stack += node.all_input_nodes
    return found


class _GraphCopier:
    """Copies the old graph call by call, with the arguments that the role of each call needs."""

    def __init__(self, builder: Builder) -> None:
        self._presents: dict[str, fx.Node] = {}
        self._attended: dict[str, fx.Node] = {}
        self._builder = builder
        self._roles = builder.roles
        self._slicer = RowSlicer(builder)
        self._attentions = {core.node for core in builder.roles.cores}

    def copy(self, node: fx.Node) -> None:
        """Copy a call; where its value is cached, append it to the cache."""
        self._builder.like = node
        args, kwargs = self._arguments(node)
        copied = self._builder.graph.create_node("call_function", node.target, args, kwargs, node.name)
        copied.meta = without_value(node)
        self._builder.new[node] = copied
        if node in self._roles.cached:
            name = self._roles.cached[node]
            self._presents[name], self._attended[name] = self._builder.append(name, copied)

    def finish(self) -> fx.Graph:
        """The graph with its outputs, without dead code."""
        logits = self._builder.new[self._roles.logits]
        if self._roles.role[self._roles.logits] is not SequenceRole.SCORED:
            logits = self._builder.scored_positions(logits)
        graph = self._builder.graph
        graph.output((logits, *(self._presents[name] for name in self._roles.cached.values())))
        graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        return graph

    def _arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = _mask(node)
        sizes = [
            item for item in node.all_input_nodes if is_size(item) and self._roles.depends_on_length(item)
        ]

        def argument(item: fx.Node) -> Any:
            if is_size(item):
                return self._builder.size(item, self._counted_positions(node, item, sizes))
            return self._value(node, item, item is mask)

        args = list(fx.map_arg(node.args, argument))
        kwargs = dict(fx.map_arg(node.kwargs, argument))
        if node in self._attentions and _is_causal(node):
            dropout = args[MASK + 1] if len(args) > MASK + 1 else 0.0
            args = [*args[:MASK], self._slicer.causal_mask(), dropout, False]
            kwargs.pop("is_causal", None)
        return tuple(args), kwargs

    def _value(self, node: fx.Node, item: fx.Node, is_mask: bool) -> fx.Node:
        """The new node that a call reads in place of a value of the old graph."""
        role, item_role = self._roles.role[node], self._roles.role[item]
        if (node, item) in self._roles.cache_reads:
            return self._attended[self._roles.cached[item]]
        if item_role is SequenceRole.POSITIONS and (is_mask or role is SequenceRole.SCORES):
            return self._slicer.query_rows(item)
        if item_role is SequenceRole.POSITIONS and role in (SequenceRole.TOKENS, SequenceRole.SCORED):
            return self._slicer.token_rows(item)
        if item_role is SequenceRole.TOKENS and role is SequenceRole.SCORED:
            new = self._builder.new[item]
            return self._builder.memoize((item, SCORES), lambda: self._builder.scored_positions(new))
        return self._builder.new[item]

    def _counted_positions(self, node: fx.Node, item: fx.Node, sizes: list[fx.Node]) -> str:
        """Which positions a size in a call counts. Of several in a call on scores, the last one counts the keys."""
        role = self._roles.role[node]
        if role is SequenceRole.SCORES:
            return ALL if item is sizes[-1] and len(sizes) > 1 else NEW
        return COUNTED_POSITIONS[role]


def _mask(node: fx.Node) -> Any:
    """The mask of a fused attention; None for any other call."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return None
    return node.args[MASK] if len(node.args) > MASK else node.kwargs.get("attn_mask")


def _is_causal(node: fx.Node) -> bool:
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    return bool(node.args[CAUSAL] if len(node.args) > CAUSAL else node.kwargs.get("is_causal", False))
