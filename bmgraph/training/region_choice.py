"""Chooses the regions of a step graph that are compiled: runs of elementwise calls, reductions and views.

Products, attention, collectives and what writes to memory in place stay calls of their own, in their order.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.ops.fusible import is_fusible, is_view, may_view
from bmgraph.ops.trait_row import Dims
from bmgraph.ops.traits import row_of

NEAR = 4
"""So many calls of other kinds may stand between an elementwise call and its user, for the two to come together."""
FEWEST = 2
"""A region computes with so many calls at least; a single one has a kernel already."""


@dataclass
class Chosen:
    """Calls in the order of the graph: those of a region, those whose results others read, and views of these results that
    others read; `last`: the last in the graph."""

    members: list[fx.Node]
    results: list[fx.Node]
    views: list[fx.Node]
    last: fx.Node


def choose_regions(graph: fx.Graph) -> Iterator[Chosen]:
    """The regions of a graph in the form that runs, one after the other; its calls are put in a better order first."""
    _gather_items(graph)
    _delay(graph)
    for run in list(_runs(graph)):
        region = _chosen(run)
        if region is not None:
            yield region


def _gather_items(graph: fx.Graph) -> None:
    """Put the items of a result right behind the call that gives it."""
    for node in list(graph.nodes):
        source: Any = node.args[0] if node.args else None
        if node.target is operator.getitem and source.op == "call_function":
            source.append(node)


def _delay(graph: fx.Graph) -> None:
    """Put an elementwise call of one tensor in front of its one user, where that is fusible too and only a few other calls
    stand between: these part them no longer. What it reads must be a computed value that nothing writes to, and no larger
    than its result, since it is kept for longer."""
    written, apart, count = _written(graph), dict[fx.Node, int](), 0
    for node in graph.nodes:
        count += node.op == "call_function" and not may_view(node.target) and not is_fusible(node.target)
        apart[node] = count
    for node in reversed(list(graph.nodes)):
        sources = node.all_input_nodes
        if (
            len(node.users) != 1
            or len(sources) != 1
            or not _is_computing(node)
            or node.target._schema.is_mutable
        ):
            continue
        (user,), base = node.users, _base(sources[0])
        given, made = tensor_of(sources[0]), tensor_of(node)
        if (
            user.op == "call_function" and is_fusible(user.target) and apart[user] - apart[node] <= NEAR
            and given is not None and made is not None and given.dtype.itemsize <= made.dtype.itemsize
            and row_of(node.target).dims is Dims.ELEMENTWISE and _is_computed(base) and base not in written
        ):  # fmt: skip
            user.prepend(node)


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Whose memory some call writes to, or may write to or release: calls that are no operators."""
    found = set()
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        mutates = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        if mutates or not isinstance(node.target, torch._ops.OpOverload):
            found |= {_base(source) for source in node.all_input_nodes if tensor_of(source) is not None}
    return found


def _is_computed(node: fx.Node) -> bool:
    return node.op == "call_function" and (
        isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
    )


def _base(node: fx.Node) -> fx.Node:
    """The call whose result a value may lie in."""
    while node.op == "call_function" and (may_view(node.target) or node.target is operator.getitem):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            break
        node = source
    return node


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor that a node gives, if it gives one."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def _is_computing(node: fx.Node) -> bool:
    return node.op == "call_function" and is_fusible(node.target) and not may_view(node.target)


def _runs(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Calls that follow each other directly and may be in one region."""
    run: list[fx.Node] = []
    for node in graph.nodes:
        if _may_join(node, run):
            run.append(node)
            continue
        yield run
        run = [node] if _may_join(node, []) else []
    yield run


def _may_join(node: fx.Node, run: list[fx.Node]) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return node.args[0] in run
    value = node.meta.get("val")
    if isinstance(value, (torch.SymInt, int)):  # a size, of what is there before the region
        return not any(source in run and tensor_of(source) is not None for source in node.all_input_nodes)
    if not isinstance(node.target, torch._ops.OpOverload) or not (
        is_fusible(node.target) or is_view(node.target)
    ):
        return False
    first: Any = node.args[0] if node.args else None
    if node.target._schema.is_mutable and not (first in run and _base(first) in run):
        return False
    values = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(item, torch.Tensor) or item is None for item in values)


def _chosen(run: list[fx.Node]) -> Chosen | None:
    """The region of a run; None if too little is computed in it.

    Sizes and views of what is outside of it stay outside, in front of it; views of its results behind it. A reshape of a view
    may copy, and then does so within.
    """
    devices = (value.device for node in run if _is_computing(node) and (value := tensor_of(node)) is not None)
    device = next(devices, None)
    members: dict[fx.Node, None] = {}
    for node in run:
        value = tensor_of(node)
        apart = isinstance(node.meta.get("val"), (torch.SymInt, int)) or (
            value is not None and value.device != device
        )
        if not apart and (
            not may_view(node.target) or any(source in members for source in node.all_input_nodes)
        ):
            members[node] = None
    if sum(map(_is_computing, members)) < FEWEST or any(
        source in members for node in run if node not in members for source in node.all_input_nodes
    ):
        return None
    last = next(node for node in reversed(run) if node in members)
    read = {node: None for node in members if any(user not in members for user in node.users)}
    views: list[fx.Node] = []
    # a kernel's result has memory of its own; a view of it is made behind it
    for node in reversed(list(members)):
        source: Any = node.args[0] if node.args else None
        if node in read and (is_view(node.target) or (may_view(node.target) and not may_view(source.target))):
            views.insert(0, node)
            read[source] = None
            if not any(user in members for user in node.users):
                del members[node]
    results = [node for node in members if node in read and node not in views]
    if any(tensor_of(node) is None for node in results):
        return None
    return Chosen(list(members), results, views, last)
