"""Replace a Gather of few columns by a product with a one-hot matrix, which is faster."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import add_constant, constant, replace

MAX_COLUMNS = 64
"""Up to this many columns the product is faster."""


def pick_by_product(model: ir.Model) -> int:
    """Replace every Gather of at most MAX_COLUMNS float32 columns (last axis, constant indices); returns the count."""
    count = 0
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
        ):
            continue
        one_hot = np.zeros((width, len(index)), np.float32)
        one_hot[index, np.arange(len(index))] = 1
        matrix = add_constant(model.graph, f"{node.outputs[0].name}_choice", one_hot)
        replace(model.graph, [node], ir.node("MatMul", [data, matrix]), node.outputs[0])
        count += 1
    return count
