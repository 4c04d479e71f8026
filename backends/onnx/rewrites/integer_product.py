"""Recognises products of rounded activations and 8-bit weights: `DequantizeLinear(codes) @ DequantizeLinear(weights) + bias`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import constant, only_use, producer


@dataclass(frozen=True)
class IntegerProduct:
    """A product of u8 codes, with one scale and zero point for all, and s8 codes with one scale an output.

    `nodes`: the product, and the Add of its bias if that is a node of its own. `activation`: the DequantizeLinear of the u8
    codes. `weight`: that of the s8 codes, `codes` i8[in, out], or i8[out, in] if `transposed`, and `scale` f32[out]. `bias`:
    f32[out], if there is one.
    """

    nodes: tuple[ir.Node, ...]
    activation: ir.Node
    weight: ir.Node
    codes: np.ndarray
    scale: np.ndarray
    transposed: bool
    bias: ir.Value | None

    @property
    def width(self) -> int:
        """The number of outputs."""
        return int(self.codes.shape[0 if self.transposed else 1])


def integer_product(node: ir.Node) -> IntegerProduct | None:
    """The product that a node computes; None if it is another call."""
    if node.op_type == "MatMul":
        return _match(node, None)
    if node.op_type == "Gemm" and _is_plain_gemm(node):
        return _match(node, node.inputs[2] if len(node.inputs) > 2 else None)
    return None


def _is_plain_gemm(node: ir.Node) -> bool:
    """Whether a Gemm is x @ W (+ bias), without factors and without transposing x."""
    attributes = node.attributes
    return (
        attributes.get_float("alpha", 1.0) == 1.0
        and attributes.get_float("beta", 1.0) == 1.0
        and attributes.get_int("transA", 0) == 0
    )


def _match(node: ir.Node, bias: ir.Value | None) -> IntegerProduct | None:
    x, weight = node.inputs[:2]
    activation = producer(x, "DequantizeLinear")
    if activation is None or not _is_per_tensor_u8(activation):
        return None
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
        return None
    codes, scale = constant(dequantize.inputs[0]), constant(dequantize.inputs[1])
    if codes is None or scale is None or codes.dtype != np.int8 or codes.ndim != 2 or scale.ndim != 1:
        return None
    if scale.dtype != np.float32 or activation.inputs[1].dtype not in (None, ir.DataType.FLOAT):  # type: ignore[union-attr]
        return None  # kernels give what their scales are, and the CPU has them for float32 alone
    if dequantize.attributes.get_int("axis", 1) % 2 != (0 if transposed else 1):
        return None
    nodes = [node]
    width = codes.shape[0] if transposed else codes.shape[1]
    if bias is not None and not _is_bias(bias, width):
        return None
    if bias is None:
        bias, add = _added_bias(node, width)
        nodes += [add] if add is not None else []
    return IntegerProduct(tuple(nodes), activation, dequantize, codes, scale, transposed, bias)


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
    """Whether a value is a constant f32[width]."""
    array = constant(value)
    return array is not None and array.shape == (width,) and array.dtype == np.float32
