"""Copies of FX nodes and graphs. `Graph.node_copy` looks for symbolic numbers in all arguments, which takes most of its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


def copy_node(graph: fx.Graph, node: fx.Node, argument: Callable[[fx.Node], Any]) -> fx.Node:
    """A copy of a node at the end of `graph`, as `Graph.node_copy` makes it; `argument` gives what stands for a node that it
    reads."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), argument)
    copied = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
    if args:
        copied.args = args
    if kwargs:
        copied.kwargs = kwargs
    copied.meta = dict(node.meta)
    return copied


def copy_nodes(graph: fx.Graph, source: fx.Graph, copies: dict[fx.Node, fx.Node]) -> Any:
    """Copy the nodes of `source` to the end of `graph`, but those that have `copies` already, as `Graph.graph_copy` does.

    Returns what stands for the values that `source` returns.
    """
    for node in source.nodes:
        if node.op == "output":
            return fx.map_arg(node.args[0], copies.__getitem__)
        if node not in copies:
            copies[node] = copy_node(graph, node, copies.__getitem__)
    return None
