"""What is made of parameters alone is made again for each reader, so that none of it lives from forward to backward."""

from __future__ import annotations

from torch import fx

from bmgraph.ir.program import output_node
from bmgraph.training.step_program import TENSOR, StepProgram


def rederive(step: StepProgram) -> None:
    """Give every reader of an expression of parameters alone (a dequantised, masked or transposed weight) a copy of
    its own, right in front of it.

    Computing a weight again costs little beside the product that reads it; keeping it would hold a second copy of the
    model from forward to backward, and of a weight that ranks share the whole.
    """
    graph = step.graph
    alone = parameter_expressions(step)
    made: dict[fx.Node, None] = {}
    for node in list(graph.nodes):
        if node in alone:
            if node.op == "call_function":
                made[node] = None
            continue
        for source in node.all_input_nodes:
            if source in alone and source.op == "call_function":
                node.replace_input_with(source, _copy(graph, source, node, {}))
    for node in reversed(made):
        if not node.users:
            graph.erase_node(node)
    graph.lint()


def parameter_expressions(step: StepProgram) -> set[fx.Node]:
    """Parameters, and the calls that depend on parameters and on nothing else (nothing returned is among them)."""
    parameters = step.outline.parameters
    returned = set(output_node(step.graph).all_input_nodes)
    alone: set[fx.Node] = set()
    for node in step.graph.nodes:
        if node.op == "placeholder":
            if node.meta.get(TENSOR) in parameters or node.meta.get(TENSOR) in step.layouts:
                alone.add(node)
        elif node.op == "call_function" and node not in returned and _all_in(alone, node.all_input_nodes):
            alone.add(node)
    return alone


def _all_in(known: set[fx.Node], nodes: list[fx.Node]) -> bool:
    return bool(nodes) and all(node in known for node in nodes)


def _copy(graph: fx.Graph, node: fx.Node, before: fx.Node, done: dict[fx.Node, fx.Node]) -> fx.Node:
    if node.op == "placeholder":
        return node
    if node not in done:
        for source in node.all_input_nodes:
            _copy(graph, source, before, done)
        with graph.inserting_before(before):
            done[node] = graph.node_copy(node, lambda old: done.get(old, old))
    return done[node]
