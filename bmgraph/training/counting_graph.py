"""The graph that counts the items of a loss from the inputs of a program alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Dims
from bmgraph.ops.traits import traits_of
from bmgraph.training.call_gradients import SYMBOLIC, Value
from bmgraph.training.size_nodes import SizeNodes

aten = torch.ops.aten


def counting_graph(program: Program, counts: Sequence[fx.Node]) -> fx.Graph:
    """A graph with the program's inputs that returns the `counts`; where only the shape of a value matters, it is not
    computed."""
    needed = _needed(counts)
    graph = fx.Graph()
    sizes = SizeNodes(graph)
    copies: dict[fx.Node, fx.Node] = {}

    def copied(node: fx.Node) -> Any:
        number = node.meta["val"]
        return sizes.node(number) if isinstance(number, SYMBOLIC) else copies.get(node) or shaped(node)

    def shaped(node: fx.Node) -> fx.Node:
        """Zeros of the shape of a value, which take no memory."""
        tensor = node.meta["val"]
        shape = [sizes.node(size) if isinstance(size, SYMBOLIC) else size for size in tensor.shape]
        zero = graph.call_function(aten.zeros.default, ([],), {"dtype": tensor.dtype})
        copies[node] = graph.call_function(aten.expand.default, (zero, shape))
        return copies[node]

    for node in program.graph.nodes:
        if node.op == "placeholder":
            copies[node] = graph.placeholder(str(node.target))
            copies[node].meta["val"] = node.meta["val"]
            sizes.take(Value(node.meta["val"], copies[node]))
        elif node in needed and not isinstance(node.meta["val"], SYMBOLIC):
            copies[node] = graph.node_copy(node, copied)
    graph.output(tuple(copied(node) for node in counts))
    graph.lint()
    return graph


def _needed(counts: Sequence[fx.Node]) -> set[fx.Node]:
    """What is computed for the counts: not what is read for its shape alone."""
    found: set[fx.Node] = set()
    stack = list(counts)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if traits_of(node).dims is not Dims.SIZES_ALONE:
                stack.extend(node.all_input_nodes)
    return found
