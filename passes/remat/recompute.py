"""Computes values of forward again in backward: each right before the first call of backward that reads it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from bmgraph.ops.trait_row import Dims, Kind
from bmgraph.ops.traits import is_elementwise, is_random, traits_of
from bmgraph.passes.remat.forward_part import ForwardPart
from bmgraph.training.collectives import COLLECTIVES
from bmgraph.training.recompute_weights import recompute_weights

_MOVES = (Kind.RESHAPE, Kind.LAYOUT, Kind.SELECTION, Kind.SPLIT, Kind.CAST)
_MOVED = (Dims.MOVED, Dims.PERMUTED, Dims.EXPANDED)


def is_pure(node: fx.Node) -> bool:
    """Whether a call gives the same value again, and changes nothing: it is not random, in place or collective."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return not isinstance(target, str) and getattr(target, "__module__", "") in (
            "_operator",
            "operator",
            "math",
        )
    if is_random(node) or target.namespace == COLLECTIVES:
        return False
    if target._schema.is_mutable or traits_of(node).writes:
        return False
    # torch calls all of these impure, also attention without dropout
    return torch.Tag.nondeterministic_seeded in target.tags or not node.is_impure()


def is_cheap(node: fx.Node) -> bool:
    """Whether a call is elementwise or moves elements: it costs no more than reading what was kept instead."""
    if not is_pure(node):
        return False
    row = traits_of(node)
    return is_elementwise(node) or row.kind in _MOVES or row.dims in _MOVED or not _is_operator(node)


def _is_operator(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def recompute(part: ForwardPart, kept: Callable[[fx.Node], bool]) -> int:
    """Let backward read copies of the calls that are not kept; returns how many calls were copied."""
    graph, copies = part.step.graph, 0
    made: dict[fx.Node, fx.Node] = {}

    def copied(node: fx.Node, before: fx.Node) -> fx.Node:
        stack = [node]
        nonlocal copies
        while stack:
            item = stack[-1]
            if item in made or not _is_copied(item):
                stack.pop()
                continue
            missing = [source for source in item.all_input_nodes if source not in made and _is_copied(source)]
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            with graph.inserting_before(before):
                made[item] = graph.node_copy(item, lambda old: made.get(old, old))
            copies += 1
        return made.get(node, node)

    def _is_copied(node: fx.Node) -> bool:
        return node.op == "call_function" and not kept(node)

    for node in part.nodes[part.end :]:
        if node.op != "call_function":
            continue
        for source in node.all_input_nodes:
            if part.is_forward(source) and source not in part.weights and _is_copied(source):
                node.replace_input_with(source, copied(source, node))
    recompute_weights(part.step)
    return copies
