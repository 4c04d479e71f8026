"""Products of rounded activations with 8-bit weights become ONNX Runtime's integer product.

`DequantizeLinear(codes) @ DequantizeLinear(weights)` + bias is one `MatMulIntegerToFloat`: u8 activations and s8
weights laid out [in, out], the pair that its CPU kernels are fast for.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import (
    DOMAIN,
    add_constant,
    constant,
    only_use,
    producer,
    replace,
)


def fuse_integer_products(model: ir.Model) -> int:
    """Fuse every such product of a model; returns their number."""
    graph = model.graph
    count = 0
    packed: dict[tuple[str, str, bool], tuple[ir.Value, ir.Value]] = {}
    for node in list(graph):
        if node.op_type == "MatMul":
            count += _fuse(graph, node, node.inputs[0], node.inputs[1], None, packed)
        elif node.op_type == "Gemm" and _plain(node):
            count += _fuse(
                graph,
                node,
                node.inputs[0],
                node.inputs[1],
                node.inputs[2] if len(node.inputs) > 2 else None,
                packed,
            )
    if count:
        graph.opset_imports.setdefault(DOMAIN, 1)
        model.opset_imports.setdefault(DOMAIN, 1)
    return count


def _plain(node: ir.Node) -> bool:
    attributes = node.attributes
    return (
        attributes.get_float("alpha", 1.0) == 1.0
        and attributes.get_float("beta", 1.0) == 1.0
        and attributes.get_int("transA", 0) == 0
    )


def _fuse(
    graph: ir.Graph, node: ir.Node, x: ir.Value | None, weight: ir.Value | None, bias: ir.Value | None,
    packed: dict[tuple[str, str, bool], tuple[ir.Value, ir.Value]],
) -> int:  # fmt: skip
    activation = producer(x, "DequantizeLinear")
    if activation is None or not _scalar_u8(activation):
        return 0
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    swap = producer(weight, "Transpose")
    if (
        swap is not None
        and list(swap.attributes.get_ints("perm", (1, 0))) == [1, 0]
        and constant(swap.outputs[0]) is None
    ):
        transposed = not transposed
        weight = swap.inputs[0]
    table = producer(weight, "DequantizeLinear")
    if table is None or (len(table.inputs) > 2 and table.inputs[2] is not None):
        return 0
    codes, scale = constant(table.inputs[0]), constant(table.inputs[1])
    if codes is None or scale is None or codes.dtype != np.int8 or codes.ndim != 2 or scale.ndim != 1:
        return 0
    if table.attributes.get_int("axis", 1) % 2 != (0 if transposed else 1):
        return 0
    nodes = [node]
    width = codes.shape[0] if transposed else codes.shape[1]
    if bias is not None and not _vector(bias, width):
        return 0
    if bias is None:
        bias, added = _bias(node, width)
        nodes += [added] if added is not None else []
    assert table.inputs[0] is not None
    assert table.inputs[1] is not None
    name = str(table.inputs[0].name)
    key = (name, str(table.inputs[1].name), transposed)  # tied codes may be read in both layouts
    if key not in packed:
        layout = np.ascontiguousarray(codes.T) if transposed else codes
        packed[key] = (
            add_constant(graph, f"{name}_packed", layout),
            add_constant(graph, f"{name}_scale", scale.astype(np.float32)),
        )
    matrix, scales = packed[key]
    quantised = activation.inputs
    new = ir.node(
        "MatMulIntegerToFloat", [quantised[0], matrix, quantised[1], scales, quantised[2], None, bias], domain=DOMAIN,
    )  # fmt: skip
    new.version = 1
    replace(graph, nodes, new, nodes[-1].outputs[0])
    return 1


def _scalar_u8(node: ir.Node) -> bool:
    """Whether an activation's codes are u8 with one scale and one zero point."""
    if len(node.inputs) < 3 or node.inputs[2] is None or node.inputs[2].dtype != ir.DataType.UINT8:
        return False
    scale = node.inputs[1]
    return scale is not None and (scale.shape is None or len(scale.shape) == 0 or scale.shape.numpy() == (1,))


def _bias(node: ir.Node, width: int) -> tuple[ir.Value | None, ir.Node | None]:
    """A constant vector added to a product, and the addition."""
    added = only_use(node.outputs[0])
    if added is None or added.op_type != "Add":
        return None, None
    other = added.inputs[1] if added.inputs[0] is node.outputs[0] else added.inputs[0]
    return (other, added) if _vector(other, width) else (None, None)


def _vector(value: ir.Value | None, width: int) -> bool:
    """Whether a value is the constant vector that the integer product takes as its bias."""
    array = constant(value)
    return array is not None and array.shape == (width,) and array.dtype == np.float32
