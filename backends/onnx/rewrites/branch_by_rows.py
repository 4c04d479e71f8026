"""Compute one of two forms: a choice between whole tensors by a single condition becomes an If."""

from __future__ import annotations

import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import NODE, producer, replace

CONDITION = "LessOrEqual"
"""The operator of the condition: a size against a constant, which holds for all elements or for none."""


def branch_by_rows(model: ir.Model) -> int:
    """Replace each Where whose condition compares a Size by an If with what only one side reads in its branches, in place;
    returns the count.

    Weights stay in the main graph: a branch reads them from there, and ONNX Runtime packs them as it packs others.
    """
    graph, count = model.graph, 0
    for node in list(graph):
        condition = producer(node.inputs[0], CONDITION) if node.op_type == "Where" else None
        if condition is None or producer(condition.inputs[0], "Size") is None:
            continue
        if not node.metadata_props.get(NODE, "").startswith("by_rows"):
            continue  # its sides may have other shapes
        branches = [
            _branch(graph, node, side, f"{node.name}_{name}") for side, name in ((1, "few"), (2, "many"))
        ]
        attributes = [
            ir.AttrGraph(name, branch) for name, branch in zip(("then_branch", "else_branch"), branches)
        ]
        made = ir.Node("", "If", [node.inputs[0]], attributes, name=f"{node.name}_by_rows")
        replace(graph, [node], made, node.outputs[0])
        count += 1
    return count


def _branch(graph: ir.Graph, choice: ir.Node, side: int, name: str) -> ir.Graph:
    """A graph of the nodes that only one side of a choice reads, taken out of the main graph; it gives that side's value."""
    value = choice.inputs[side]
    assert value is not None
    own = _exclusive(graph, choice, side)
    if not own:  # a branch makes what it gives
        same = ir.Node("", "Identity", [value], name=f"{name}_same")
        same.outputs[0].name, same.outputs[0].shape, same.outputs[0].type = (
            f"{name}_given",
            value.shape,
            value.type,
        )
        return ir.Graph([], same.outputs, nodes=[same], name=name)
    choice.replace_input_with(side, None)
    graph.remove(own)
    return ir.Graph([], [value], nodes=own, name=name)


def _exclusive(graph: ir.Graph, choice: ir.Node, side: int) -> list[ir.Node]:
    """The nodes before a choice, in order, whose values are read by that side of it alone."""
    own: set[ir.Node] = set()
    found: list[ir.Node] = []
    nodes = list(graph)
    for node in reversed(nodes[: nodes.index(choice)]):
        uses = [use for value in node.outputs for use in value.uses()]
        given = any(value.is_graph_output() for value in node.outputs)
        if (
            uses
            and not given
            and all(use.node in own or (use.node is choice and use.idx == side) for use in uses)
        ):
            own.add(node)
            found.append(node)
    return found[::-1]
