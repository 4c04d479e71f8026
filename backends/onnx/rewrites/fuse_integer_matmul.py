"""Fuse products of quantised activations and 8-bit weights into MatMulIntegerToFloat.

`DequantizeLinear(codes) @ DequantizeLinear(weights) + bias` becomes one node with u8 activations and s8 weights laid out
[in, out], the combination that ONNX Runtime's CPU kernels run fastest.
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
    """Fuse every such MatMul or Gemm; returns the count."""
    graph = model.graph
    count = 0
    packed: dict[tuple[str, str, bool], tuple[ir.Value, ir.Value]] = {}
    for node in list(graph):
        if node.op_type == "MatMul":
            count += _fuse(graph, node, node.inputs[0], node.inputs[1], None, packed)
        elif node.op_type == "Gemm" and _is_plain_gemm(node):
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


def _is_plain_gemm(node: ir.Node) -> bool:
    """Whether a Gemm is x @ W (+ bias), without factors and without transposing x."""
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
    """Fuse one product if it qualifies; returns 1 or 0. `packed` maps weights to their repacked constants."""
    activation = producer(x, "DequantizeLinear")
    if activation is None or not _is_per_tensor_u8(activation):
        return 0
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    transpose = producer(weight, "Transpose")
    if (
        transpose is not None
        and list(transpose.attributes.get_ints("perm", (1, 0))) == [1, 0]
        and constant(transpose.outputs[0]) is None
    ):
        transposed = not transposed
        weight = transpose.inputs[0]
    dequantize = producer(weight, "DequantizeLinear")
    if dequantize is None or (len(dequantize.inputs) > 2 and dequantize.inputs[2] is not None):
        return 0
    codes, scale = constant(dequantize.inputs[0]), constant(dequantize.inputs[1])
    if codes is None or scale is None or codes.dtype != np.int8 or codes.ndim != 2 or scale.ndim != 1:
        return 0
    if scale.dtype != np.float32 or activation.inputs[1].dtype not in (None, ir.DataType.FLOAT):  # type: ignore[union-attr]
        return 0  # the kernel gives what its scales are, and the CPU has it for float32 alone
    if dequantize.attributes.get_int("axis", 1) % 2 != (0 if transposed else 1):
        return 0
    nodes = [node]
    width = codes.shape[0] if transposed else codes.shape[1]
    if bias is not None and not _is_bias(bias, width):
        return 0
    if bias is None:
        bias, add = _added_bias(node, width)
        nodes += [add] if add is not None else []
    assert dequantize.inputs[0] is not None
    assert dequantize.inputs[1] is not None
    name = str(dequantize.inputs[0].name)
    key = (name, str(dequantize.inputs[1].name), transposed)  # tied weights may be read in both layouts
    if key not in packed:
        layout = np.ascontiguousarray(codes.T) if transposed else codes
        packed[key] = (
            add_constant(graph, f"{name}_packed", layout),
            add_constant(graph, f"{name}_scale", scale),
        )
    matrix, scales = packed[key]
    quantised = activation.inputs
    new = ir.node(
        "MatMulIntegerToFloat", [quantised[0], matrix, quantised[1], scales, quantised[2], None, bias], domain=DOMAIN,
    )  # fmt: skip
    new.version = 1
    replace(graph, nodes, new, nodes[-1].outputs[0])
    return 1


def _is_per_tensor_u8(node: ir.Node) -> bool:
    """Whether a DequantizeLinear reads u8 codes with one scale and one zero point."""
    if len(node.inputs) < 3 or node.inputs[2] is None or node.inputs[2].dtype != ir.DataType.UINT8:
        return False
    scale = node.inputs[1]
    return scale is not None and (scale.shape is None or len(scale.shape) == 0 or scale.shape.numpy() == (1,))


def _added_bias(node: ir.Node, width: int) -> tuple[ir.Value | None, ir.Node | None]:
    """The constant bias added to a product, and the Add node; (None, None) if there is none."""
    add = only_use(node.outputs[0])
    if add is None or add.op_type != "Add":
        return None, None
    other = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
    return (other, add) if _is_bias(other, width) else (None, None)


def _is_bias(value: ir.Value | None, width: int) -> bool:
    """Whether a value is a constant f32[width], as the fused operator requires."""
    array = constant(value)
    return array is not None and array.shape == (width,) and array.dtype == np.float32
