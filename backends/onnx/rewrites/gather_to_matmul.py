"""Replace a Gather of few columns by a product with a one-hot matrix, which is faster.

A product also reads the columns that are not picked, and 0 times infinity is NaN: only values that the model keeps finite
are picked in this way, never such as masks or scores with -inf.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import add_constant, constant, replace

MAX_COLUMNS = 64
"""Up to this many columns the product is faster."""

BOUNDED = frozenset(
    {
        "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization", "Softmax",
        "DequantizeLinear", "MatMulIntegerToFloat",
    }
)  # fmt: skip
"""Operators whose output is finite in a whole row or in none of it; a Softmax along the rows."""

KEEPS_FINITE = frozenset(
    {
        "Add", "Sub", "Mul", "Neg", "Abs", "Sum", "MatMul", "Gemm", "Gelu", "Relu", "Clip", "Identity", "Reshape", "Transpose",
        "Concat", "Slice", "Split", "Gather", "Squeeze", "Unsqueeze", "Expand", "Cast", "MultiHeadAttention",
        "Softmax", "Sigmoid", "Tanh", "Erf", "Sin", "Cos",
    }
)  # fmt: skip
"""Operators whose output is finite if their floating-point inputs are (and do not overflow)."""


def pick_by_product(model: ir.Model) -> int:
    """Replace every Gather of at most MAX_COLUMNS float32 columns (last axis, constant indices); returns the count."""
    count = 0
    finite: dict[ir.Value, bool] = {}
    for node in list(model.graph):
        if node.op_type != "Gather":
            continue
        data, index = node.inputs[0], constant(node.inputs[1])
        if (
            data is None
            or data.shape is None
            or data.dtype != ir.DataType.FLOAT
            or index is None
            or index.ndim != 1
        ):
            continue
        axis, rank = node.attributes.get_int("axis", 0), len(data.shape)
        width = data.shape[-1]
        if (
            axis % rank != rank - 1
            or rank < 2
            or not isinstance(width, int)
            or len(index) > MAX_COLUMNS
            or constant(data) is not None
            or not _stays_finite(data, finite)
        ):
            continue
        one_hot = np.zeros((width, len(index)), np.float32)
        one_hot[index, np.arange(len(index))] = 1
        matrix = add_constant(model.graph, f"{node.outputs[0].name}_choice", one_hot)
        replace(model.graph, [node], ir.node("MatMul", [data, matrix]), node.outputs[0])
        count += 1
    return count


def _stays_finite(value: ir.Value, known: dict[ir.Value, bool]) -> bool:
    """Whether a model keeps a value finite, as far as its operators tell; floating-point inputs may be infinite."""
    stack = [value]
    while stack:
        item = stack[-1]
        producer = item.producer()
        array = constant(item)
        if item in known:
            stack.pop()
        elif array is not None:
            known[item] = array.dtype.kind in "iub" or bool(np.isfinite(array).all())
        elif item.dtype is not None and not item.dtype.is_floating_point():
            known[item] = True
        elif producer is None or producer.op_type not in BOUNDED | KEEPS_FINITE:
            known[item] = False
        elif producer.op_type in BOUNDED and _works_on_rows(producer, item):
            known[item] = True
        else:
            inputs = [source for source in producer.inputs if source is not None]
            waiting = [source for source in inputs if source not in known]
            stack += waiting
            if not waiting:
                known[item] = all(known[source] for source in inputs)
    return known[value]


def _works_on_rows(node: ir.Node, output: ir.Value) -> bool:
    """Whether a bounded operator mixes the values of a row: a Softmax along another axis may make NaN of one column."""
    if node.op_type != "Softmax" or output.shape is None:
        return node.op_type != "Softmax"
    rank = len(output.shape)
    return node.attributes.get_int("axis", -1) % rank == rank - 1
