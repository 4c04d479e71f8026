"""Brings a traced graph to the form of a step's: named placeholders, a flat tuple of results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from bmgraph.ir.program import output_node
from bmgraph.training.step_program import CONSTANT, TENSOR
from bmgraph.utils.graph_copies import copy_node

aten = torch.ops.aten


def flat_graph(graph: fx.Graph, inputs: list[str], read: list[str], constants: Iterable[str]) -> fx.Graph:
    """The traced graph with named placeholders, also for `constants`, a flat tuple of results and no dead code.

    `view` becomes `reshape`: some backward kernels return other strides than their fake tensors have, and a `view` that
    was traced on the latter would fail. Sizes of inputs come first, in the order of inputs and axes: tracing reads them in
    the order of a set, which differs between processes, and all ranks must have one graph.
    """
    flat = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    arguments = [node for node in graph.nodes if node.op == "placeholder"]
    assert len(arguments) == len(inputs) + len(read)
    for node, name in zip(arguments, inputs):
        values[node] = flat.placeholder(name)
    for index, (node, name) in enumerate(zip(arguments[len(inputs) :], read)):
        values[node] = flat.placeholder(f"tensor_{index}")
        values[node].meta[TENSOR] = name
    for index, name in enumerate(constants):
        readers = [node for node in graph.nodes if node.op == "get_attr" and node.target == name]
        placeholder = flat.placeholder(f"constant_{index}")
        placeholder.meta[TENSOR] = f"{CONSTANT}{name}"
        arguments += readers
        values |= dict.fromkeys(readers, placeholder)
    for node in arguments:
        values[node].meta["val"] = node.meta["val"]
    places = {node: index for index, node in enumerate(arguments)}
    sizes = [node for node in graph.nodes if node.target is aten.sym_size.int and node.args[0] in places]
    sizes.sort(key=lambda node: (places[node.args[0]], node.args[1]))
    first = set(sizes)
    for node in [*sizes, *(node for node in graph.nodes if node not in first)]:
        if node.op == "call_function":
            values[node] = copy_node(flat, node, values.__getitem__)
            if node.target is aten.view.default:
                values[node].target = aten.reshape.default
    returned: Any = output_node(graph).args[0]
    flat.output(tuple(values[node] for node in returned))
    for node in reversed(list(flat.nodes)):
        if not node.users and node.op == "call_function":
            flat.erase_node(node)
    flat.lint()
    return flat
