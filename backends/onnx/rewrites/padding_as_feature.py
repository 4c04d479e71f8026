"""Fold a padding mask into an extra feature of queries and keys, so that attention runs its faster unmasked kernel.

The feature is 1 in every query; in keys it is 0, and very negative at padding: the product hides the key, and adds an exact
0 to every other score. ONNX Runtime's CPU kernel is about twice as fast without a mask input, and a row still computes the
same bits whatever else is in its batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import PROVENANCE, add_constant, constant, only_use, producer

HIDING = -1e4
"""The kernel's default for what is added to the scaled score of a padding key: its exponential is 0."""

LEAST = -1e30
"""The least number that is added: any score vanishes beside it, and a product with it stays finite."""


@dataclass(frozen=True)
class _Projection:
    """A product with a constant matrix [in, heads * size], and the Add of its bias if that is a separate node."""

    node: ir.Node
    add: ir.Node | None


def fold_padding(model: ir.Model) -> int:
    """Fold the padding mask of every MultiHeadAttention whose queries and keys are projections; returns the count."""
    graph = model.graph
    count = 0
    penalties: dict[tuple[str, int, int, float, float], ir.Value] = {}
    for node in list(graph):
        if node.op_type != "MultiHeadAttention" or len(node.inputs) < 5 or node.inputs[4] is None:
            continue
        if (
            node.inputs[3] is not None
            or node.attributes.get_int("unidirectional", 0) != 0
            or any(item is not None for item in node.inputs[5:])
        ):
            continue
        query, key = _projection(node.inputs[0]), _projection(node.inputs[1])
        if query is None or key is None or query.node is key.node:
            continue
        heads = node.attributes.get_int("num_heads", 1)
        width = _width(query)
        if width != _width(key) or width % heads or not (_is_float32(query) and _is_float32(key)):
            continue
        scale = node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(width // heads)
        _add_feature(graph, query, heads, 1.0)
        _add_feature(graph, key, heads, 0.0)
        mask = node.inputs[4]
        assert mask.name is not None
        hiding = max(node.attributes.get_float("mask_filter_value", HIDING), LEAST)
        group = (mask.name, heads, width, scale, hiding)
        if group not in penalties:
            penalties[group] = _penalty(graph, node, mask, heads, width // heads, hiding / scale)
        keys = node.inputs[1]
        assert keys is not None
        masked = ir.node("Add", [keys, penalties[group]])
        masked.metadata_props.update(
            {k: node.metadata_props[k] for k in PROVENANCE if k in node.metadata_props}
        )
        masked.outputs[0].name = f"{keys.name}_or_padding"
        masked.outputs[0].type = keys.type
        graph.insert_before(node, masked)
        node.replace_input_with(1, masked.outputs[0])
        node.replace_input_with(4, None)
        node.attributes["scale"] = ir.AttrFloat32("scale", scale)
        count += 1
    return count


def _projection(value: ir.Value | None) -> _Projection | None:
    """The projection (and bias) that computes a value, if only attention reads it and its matrix is not shared."""
    if value is None or only_use(value) is None:
        return None
    product = producer(value, "MatMulIntegerToFloat", "MatMul")
    if product is not None:
        return (
            _Projection(product, None)
            if constant(product.inputs[1]) is not None and _owns_matrix(product)
            else None
        )
    add = producer(value, "Add")
    if add is None:
        return None
    for projected, other in (add.inputs, tuple(reversed(add.inputs))):
        product = producer(projected, "MatMul")
        bias = constant(other)
        if (
            product is not None
            and bias is not None
            and constant(product.inputs[1]) is not None
            and bias.shape == constant(product.inputs[1]).shape[-1:]  # type: ignore[union-attr]
        ):
            return (
                _Projection(product, add)
                if only_use(product.outputs[0]) is add and _owns_matrix(product)
                else None
            )
    return None


def _owns_matrix(product: ir.Node) -> bool:
    """Whether the right operand of a product is a matrix that nothing else reads."""
    matrix = product.inputs[1]
    assert matrix is not None
    return len(matrix.uses()) == 1 and constant(matrix).ndim == 2  # type: ignore[union-attr]


def _is_float32(projection: _Projection) -> bool:
    """Whether a projection computes in float32, the type of the features that are added."""
    node = projection.node
    array = constant(node.inputs[3 if node.op_type == "MatMulIntegerToFloat" else 1])
    return array is not None and array.dtype == np.float32


def _width(projection: _Projection) -> int:
    """The number of output features."""
    matrix = constant(projection.node.inputs[1])
    assert matrix is not None
    return int(matrix.shape[1])


def _add_feature(graph: ir.Graph, projection: _Projection, heads: int, value: float) -> None:
    """Give every head one more feature, with the constant value `value`."""
    node = projection.node
    _extend_constant(graph, node, 1, heads, 0)
    if node.op_type == "MatMulIntegerToFloat":
        _extend_constant(graph, node, 3, heads, 1)
        if len(node.inputs) > 6 and node.inputs[6] is not None:
            _extend_constant(graph, node, 6, heads, value)
        else:
            width = _width(projection)
            bias = np.zeros((heads, width // heads), np.float32)
            bias[:, -1] = value
            node.resize_inputs(7)
            node.replace_input_with(6, add_constant(graph, f"{node.inputs[1].name}_bias", bias.reshape(-1)))  # type: ignore[union-attr]
        results = [node.outputs[0]]
    elif projection.add is not None:
        add = projection.add
        _extend_constant(graph, add, 1 if constant(add.inputs[1]) is not None else 0, heads, value)
        results = [node.outputs[0], add.outputs[0]]
    else:
        results = [node.outputs[0]]
        if value:
            bias = np.zeros((heads, _width(projection) // heads), np.float32)
            bias[:, -1] = value
            user = only_use(node.outputs[0])
            assert user is not None
            add = ir.node(
                "Add", [node.outputs[0], add_constant(graph, f"{node.outputs[0].name}_one", bias.reshape(-1))]
            )
            add.metadata_props.update(node.metadata_props)
            add.outputs[0].name = f"{node.outputs[0].name}_and_one"
            add.outputs[0].type = node.outputs[0].type
            graph.insert_after(node, add)
            user.replace_input_with(list(user.inputs).index(node.outputs[0]), add.outputs[0])
    for result in results:
        if result.shape is not None:
            result.shape = ir.Shape([*list(result.shape)[:-1], _width(projection)])


def _extend_constant(graph: ir.Graph, node: ir.Node, index: int, heads: int, value: float) -> None:
    """Extend the constant input `index` from [..., heads * size] to [..., heads * (size + 1)]; new entries are `value`."""
    old = node.inputs[index]
    array = constant(old)
    assert old is not None
    assert array is not None
    per_head = array.reshape(*array.shape[:-1], heads, -1)
    extra = np.full((*per_head.shape[:-1], 1), value, array.dtype)
    extended = np.concatenate([per_head, extra], -1).reshape(*array.shape[:-1], -1)
    node.replace_input_with(index, add_constant(graph, f"{old.name}_wide", extended))


def _penalty(
    graph: ir.Graph, before: ir.Node, mask: ir.Value, heads: int, size: int, hiding: float
) -> ir.Value:
    """f32[batch, keys, heads * (size + 1)]: `hiding` in the last feature of every head at padding, else 0."""
    pattern = np.zeros((heads, size + 1), np.float32)
    pattern[:, -1] = hiding
    zero = add_constant(graph, "padding_zero", np.zeros((), np.int32))
    last = add_constant(graph, "padding_axis", np.array([-1], np.int64))
    values = add_constant(graph, "padding_pattern", pattern.reshape(-1))
    nodes: list[ir.Node] = []

    def emit(operator: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        node = ir.node(operator, inputs, attributes or None)
        node.outputs[0].name = f"padding_{operator.lower()}_{mask.name}_{heads}_{size}"
        node.metadata_props.update(
            {k: before.metadata_props[k] for k in PROVENANCE if k in before.metadata_props}
        )
        nodes.append(node)
        return node.outputs[0]

    is_padding = emit("Cast", [emit("Equal", [mask, zero])], to=int(ir.DataType.FLOAT))
    result = emit("Mul", [emit("Unsqueeze", [is_padding, last]), values])
    for node in nodes:
        graph.insert_before(before, node)
    return result
