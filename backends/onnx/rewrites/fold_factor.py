"""Multiply what a product with stored weights gives by a factor, in its weights: the product then costs what it did."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import DOMAIN, add_computed, producer

SCALES = {"MatMulNBits": (2, 5), "MatMulIntegerToFloat": (3, 6)}
"""Of products with codes the indices of the scales of their weights and of their bias, both of which the result is linear in."""


def fold_factor(value: ir.Value, factor: float) -> bool:
    """Let a value f[B, S, N], of which nothing but one node reads more than the shape, be `factor` times what it was; False, and nothing done, where it is not a
    product with f32 weights or scales, with or without a bias."""
    inputs = _linear_inputs(value)
    if not inputs:
        return False
    if factor != 1:
        for node, index in inputs:
            node.replace_input_with(index, _multiplied(node.graph, node.inputs[index], factor))  # type: ignore[arg-type]
    return True


def _linear_inputs(value: ir.Value | None) -> list[tuple[ir.Node, int]]:
    """The stored inputs that a product is linear in together; none for another value."""
    if value is None or value.is_graph_output():
        return []
    if sum(use.node.op_type != "Shape" for use in value.uses()) != 1:
        return []
    node = value.producer()
    if node is None:
        return []
    if node.op_type == "Add" and not node.domain:
        bias = next((index for index, item in enumerate(node.inputs) if _is_stored(item)), None)
        found = [] if bias is None else _linear_inputs(node.inputs[1 - bias])
        return [*found, (node, bias)] if found and bias is not None else []
    if node.op_type == "MatMul" and not node.domain:
        transpose = producer(node.inputs[1], "Transpose")
        holder = (node, 1) if transpose is None else (transpose, 0)
        shared = transpose is not None and len(transpose.outputs[0].uses()) != 1
        return [holder] if not shared and _is_stored(holder[0].inputs[holder[1]]) else []
    if node.domain != DOMAIN or node.op_type not in SCALES:
        return []
    given = [
        index for index in SCALES[node.op_type] if len(node.inputs) > index and node.inputs[index] is not None
    ]
    return (
        [(node, index) for index in given] if all(_is_stored(node.inputs[index]) for index in given) else []
    )


def _is_stored(value: ir.Value | None) -> bool:
    return (
        value is not None
        and value.const_value is not None
        and not value.is_graph_input()
        and value.dtype == ir.DataType.FLOAT
    )


def _multiplied(graph: ir.Graph, value: ir.Value, factor: float) -> ir.Value:
    assert value.shape is not None
    assert value.const_value is not None
    held, shape = value.const_value, tuple(int(size) for size in value.shape)  # type: ignore[arg-type]
    return add_computed(
        graph, f"{value.name}_scaled", lambda: held.numpy() * np.float32(factor), np.dtype(np.float32), shape
    )
