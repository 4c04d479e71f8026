"""Recompute values that depend on parameters alone, and float32 copies, instead of keeping them from forward to backward."""

from __future__ import annotations

import torch
from torch import fx

from bmgraph.ir.program import output_node
from bmgraph.ops.traits import is_random
from bmgraph.training.fp32_form import HALVES
from bmgraph.training.step_program import TENSOR, StepProgram
from bmgraph.utils.graph_copies import copy_node


def recompute_weights(step: StepProgram) -> None:
    """Give every reader of such a value (a dequantized, masked or transposed weight) its own copy, right before it.

    Computing a weight is cheap compared with the product that reads it. Keeping it would hold a second copy of the
    model from forward to backward, and all of a weight that is sharded over ranks.
    """
    graph = step.graph
    from_parameters = parameter_expressions(step)
    originals: dict[fx.Node, None] = {}
    for node in list(graph.nodes):
        if node in from_parameters:
            if node.op == "call_function":
                originals[node] = None
            continue
        for source in node.all_input_nodes:
            if source in from_parameters and source.op == "call_function":
                node.replace_input_with(source, _copy(graph, source, node, {}))
    for node in reversed(originals):
        if not node.users:
            graph.erase_node(node)
    graph.lint()


def recompute_casts(step: StepProgram) -> None:
    """Give every reader but the first of a half-precision value's float32 copy a copy of its own, right before it.

    Norms and softmax read such copies in forward and again in backward: kept, they would be twice the value itself.
    """
    graph = step.graph
    seen: set[fx.Node] = set()
    for node in list(graph.nodes):
        for source in node.all_input_nodes if node.op == "call_function" else ():
            if not _widens(source):
                continue
            if source in seen:
                with graph.inserting_before(node):
                    node.replace_input_with(source, copy_node(graph, source, lambda old: old))
            seen.add(source)
    graph.lint()


def _widens(node: fx.Node) -> bool:
    if node.target is not torch.ops.aten._to_copy.default or node.meta["val"].dtype != torch.float32:
        return False
    return node.all_input_nodes[0].meta["val"].dtype in HALVES


def parameter_expressions(step: StepProgram) -> set[fx.Node]:
    """Parameters, and the calls that depend on parameters alone and are not returned.

    A random call (dropout of a weight) is none of them: forward and backward must read the same random numbers.
    """
    parameters = {
        name for name, place in step.places.items() if set(place.names) <= set(step.outline.parameters)
    }
    returned = set(output_node(step.graph).all_input_nodes)
    found: set[fx.Node] = set()
    for node in step.graph.nodes:
        if node.op == "placeholder":
            if node.meta.get(TENSOR) in parameters:
                found.add(node)
        elif (
            node.op == "call_function"
            and node not in returned
            and not is_random(node)
            and _all_in(found, node.all_input_nodes)
        ):
            found.add(node)
    return found


def _all_in(known: set[fx.Node], nodes: list[fx.Node]) -> bool:
    return bool(nodes) and all(node in known for node in nodes)


def _copy(graph: fx.Graph, node: fx.Node, before: fx.Node, done: dict[fx.Node, fx.Node]) -> fx.Node:
    if node.op == "placeholder":
        return node
    if node not in done:
        for source in node.all_input_nodes:
            _copy(graph, source, before, done)
        with graph.inserting_before(before):
            done[node] = copy_node(graph, node, lambda old: done.get(old, old))
    return done[node]
