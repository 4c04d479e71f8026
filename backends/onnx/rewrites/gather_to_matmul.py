"""A few columns picked from a tensor are picked by a small product: gathering them one by one is slower."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import add_constant, constant, replace

MOST = 64
"""The most columns for which the product is the faster form."""


def pick_by_product(model: ir.Model) -> int:
    """Replace every Gather of few columns, of the last axis of floats, by a product with a matrix of zeros and ones."""
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
            or len(index) > MOST
            or constant(data) is not None
        ):
            continue
        chosen = np.zeros((width, len(index)), np.float32)
        chosen[index, np.arange(len(index))] = 1
        table = add_constant(model.graph, f"{node.outputs[0].name}_choice", chosen)
        replace(model.graph, [node], ir.node("MatMul", [data, table]), node.outputs[0])
        count += 1
    return count
