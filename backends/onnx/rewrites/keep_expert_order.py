"""Leave rows in the order of experts between two products: what restores the order of tokens and sorts again is dropped.

A product per expert sorts rows by expert and restores their order; so does the next one. What lies between treats each row alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import NODE, PROVENANCE, add_constant, constant, producer

PRODUCT = "experts_linear"
"""How nodes of the program are called that restore rows f[R, O] as f[T, K, O]."""

ELEMENTWISE = frozenset(
    ("Abs", "Add", "Cast", "CastLike", "Clip", "Div", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Max", "Min", "Mul", "Neg",
     "Pow", "QuickGelu", "Relu", "Sigmoid", "Softplus", "Sub", "Tanh")
)  # fmt: skip
"""Operators that compute each element from those at its place."""


def keep_expert_order(model: ir.Model) -> int:
    """Drop each such pair of gathers, in place; returns the count."""
    graph, count = model.graph, 0
    for node in list(graph):
        if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
            continue
        rows = producer(node.inputs[0], "Reshape")
        order = node.inputs[1]
        if rows is None or order is None or not _is_flat(rows):
            continue
        found = _between(rows, order)
        if found:
            _compute_sorted(graph, node, rows, found)
            count += 1
    return count


def _is_flat(node: ir.Node) -> bool:
    """Whether a Reshape keeps the last axis and makes all others one."""
    shape, source = constant(node.inputs[1]), node.inputs[0]
    size = source.shape[-1] if source is not None and source.shape else None
    return shape is not None and shape.shape == (2,) and shape[0] == -1 and shape[1] == size


def _between(rows: ir.Node, order: ir.Value) -> list[ir.Node] | None:
    """The nodes from values whose order was restored to the input of a Reshape, in order; None if there is anything else.

    Nothing else reads what they compute.
    """
    found: dict[ir.Node, None] = {}

    def walk(value: ir.Value | None, readers: set[ir.Node]) -> bool:
        if value is None or _is_row(value):
            return True
        node = value.producer()
        if node is None:
            return False
        if node in found:
            return True
        if _sorted_source(node, order) is None and not all(
            walk(item, readers | {node}) for item in _read(node)
        ):
            return False
        found[node] = None
        return True

    def _read(node: ir.Node) -> list[ir.Value | None]:
        if node.op_type == "Slice" and _of_last_axis(node):
            return [node.inputs[0]]
        return list(node.inputs) if node.op_type in ELEMENTWISE else [ir.Value(name="other")]

    if not walk(rows.inputs[0], {rows}):
        return None
    for node in found:
        if _sorted_source(node, order) is None and any(
            value.is_graph_output() or any(use.node is not rows and use.node not in found for use in value.uses())
            for value in node.outputs
        ):  # fmt: skip
            return None
    return list(found) if any(_sorted_source(node, order) is not None for node in found) else None


def _is_row(value: ir.Value) -> bool:
    """Whether a value is a constant number, or one number for each place of a row."""
    array = constant(value)
    return array is not None and (array.ndim <= 1 or array.size == 1)


def _sorted_source(node: ir.Node, order: ir.Value) -> ir.Value | None:
    """The rows in the order of experts whose former order a Reshape of a Gather restores; None for another node."""
    ours = node.op_type == "Reshape" and node.metadata_props.get(NODE, "").startswith(PRODUCT)
    restored = producer(node.inputs[0], "Gather") if ours else None
    if restored is None or restored.attributes.get_int("axis", 0) != 0:
        return None
    inverse = producer(restored.inputs[1], "TopK")
    if inverse is None or inverse.inputs[0] is not order or restored.inputs[1] is not inverse.outputs[1]:
        return None
    return restored.inputs[0] if inverse.attributes.get_int("largest", 1) == 0 else None


def _of_last_axis(node: ir.Node) -> bool:
    """Whether a Slice takes a range of the last axis."""
    source, axes = node.inputs[0], constant(node.inputs[3]) if len(node.inputs) > 3 else None
    rank = len(source.shape) if source is not None and source.shape else 0
    return axes is not None and axes.size == 1 and int(axes.reshape(-1)[0]) in (-1, rank - 1)


def _compute_sorted(graph: ir.Graph, gather: ir.Node, rows: ir.Node, between: list[ir.Node]) -> None:
    """Compute the nodes on sorted rows, in place of a Gather that sorts what they gave."""
    order = gather.inputs[1]
    assert order is not None
    values: dict[ir.Value, ir.Value] = {}
    for node in between:
        source = _sorted_source(node, order)
        if source is not None:
            values[node.outputs[0]] = source
            continue
        inputs = [values.get(item, item) if item is not None else None for item in node.inputs]
        if node.op_type == "Slice":
            inputs[3] = add_constant(graph, f"{node.outputs[0].name}_axis", np.array([-1]))
        made = ir.Node(
            node.domain, node.op_type, inputs, list(node.attributes.values()), name=f"{node.name}_sorted"
        )
        made.version = node.version
        made.metadata_props.update(
            {key: node.metadata_props[key] for key in PROVENANCE if key in node.metadata_props}
        )
        made.outputs[0].name, made.outputs[0].type = f"{node.outputs[0].name}_sorted", node.outputs[0].type
        old = node.outputs[0].shape
        made.outputs[0].shape = ir.Shape([None, old[-1]]) if old else None
        values[node.outputs[0]] = made.outputs[0]
        graph.insert_before(gather, made)
    result = rows.inputs[0]
    assert result is not None
    gather.outputs[0].replace_all_uses_with(values[result])
    graph.remove(gather, safe=True)
