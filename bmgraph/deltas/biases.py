"""Finds the biases of a model: what its linears, norms and convolutions add."""

from __future__ import annotations

from torch import fx

from bmgraph.ir.node_role import is_delta
from bmgraph.ir.program import Program
from bmgraph.ops.traits import argument, place_of


def biases_of(program: Program) -> list[str]:
    """The parameters that a call of the model reads as its bias, in the order of the graph."""
    found: dict[str, None] = {}
    for graph in program.graphs.values():
        for node in graph.nodes:
            if node.op != "call_function" or is_delta(node) or place_of(node.target, "bias") is None:
                continue
            bias = argument(node, "bias")
            if isinstance(bias, fx.Node) and bias.op == "get_attr" and str(bias.target) in program.parameters:
                found[str(bias.target)] = None
    return list(found)
