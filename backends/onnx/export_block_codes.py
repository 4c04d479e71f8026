"""ONNX forms of codes of blocks: MatMulNBits, GatherBlockQuantized, and DequantizeLinear with `block_size`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from bmgraph.backends.onnx import contrib_ops
from bmgraph.backends.onnx.rewrites.graph_utils import constant
from bmgraph.ops.block_codes import block_size, unpack_codes, unpack_zeros, zero_code

EIGHT_BITS, FLOAT = 4, 1
"""Values of `accuracy_level`: the kernel rounds each block of the input to 8 bits, or computes in float32."""


def block_code_translations() -> dict[Callable[..., object], Callable[..., object]]:
    """The operators of `bmgraph.ops.block_codes` -> their translations.

    The kernels take 2 ** (bits - 1) for the code of zero where no zero points are given. DequantizeLinear takes 0: its codes are
    stored as signed ones, by `store_by_type`.
    """
    from onnxscript import opset23

    op: Any = opset23
    product, lookup = contrib_ops.matmul_nbits(), contrib_ops.gather_block_quantized()

    def linear_blocks(
        x: Any, codes: Any, scale: Any, bias: Any, bits: int, columns: int, rounded: bool, zero: Any = None
    ) -> Any:
        level = EIGHT_BITS if rounded else FLOAT
        return product(
            x, codes, scale, zero, None, bias, K=columns, N=int(codes.shape[0]), bits=bits, block_size=block_size(codes, bits),
            accuracy_level=level,
        )  # fmt: skip

    def embedding_blocks(codes: Any, ids: Any, scale: Any, bits: int, block: int, zero: Any = None) -> Any:
        # the kernel does not check ids; files are only loaded with these bounds
        rows = op.Clip(ids, op.Constant(value_int=0), op.Constant(value_int=int(codes.shape[0]) - 1))
        given = (codes, rows, scale) if zero is None else (codes, rows, scale, zero)
        return lookup(*given, gather_axis=0, quantize_axis=1, block_size=block, bits=bits)

    def dequantize_blocks(codes: Any, scale: Any, bits: int, columns: int, zero: Any = None) -> Any:
        given = (codes, scale) if zero is None else (codes, scale, zero)
        return op.DequantizeLinear(*given, axis=1, block_size=block_size(codes, bits))

    ours = torch.ops.bmgraph
    return {
        ours.linear_blocks.default: linear_blocks,
        ours.embedding_blocks.default: embedding_blocks,
        ours.dequantize_blocks.default: dequantize_blocks,
    }


def store_by_type(model: ir.Model) -> None:
    """Store the packed codes that a DequantizeLinear reads as ones [N, K] of their type, in place: signed, or unsigned beside zero
    points [N, B]."""
    for node in model.graph:
        if node.op_type != "DequantizeLinear" or "block_size" not in node.attributes:
            continue
        codes, weight = node.inputs[0], node.outputs[0]
        packed = constant(codes)
        if (
            codes is None
            or packed is None
            or packed.dtype != np.uint8
            or packed.ndim != 3
            or weight.shape is None
        ):
            continue
        bits = packed.shape[-1] * 8 // node.attributes.get_int("block_size", 0)
        signed = unpack_codes(torch.from_numpy(packed), bits, int(weight.shape[1]))  # type: ignore[arg-type]
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        points = constant(zero)
        if zero is None or points is None:
            _store(codes, signed, ir.DataType.INT4 if bits == 4 else ir.DataType.INT8)
            continue
        kind = ir.DataType.UINT4 if bits == 4 else ir.DataType.UINT8
        shifted = unpack_zeros(torch.from_numpy(points), bits, packed.shape[1])
        for value, found in ((codes, signed), (zero, shifted)):
            _store(value, (found.to(torch.int16) + zero_code(bits)).to(torch.uint8), kind)


def _store(value: ir.Value, numbers: torch.Tensor, kind: ir.DataType) -> None:
    """Let a constant be these numbers, of a type."""
    value.const_value = ir.tensor(numbers.numpy(), dtype=kind, name=value.name)
    value.shape, value.type = ir.Shape(numbers.shape), ir.TensorType(kind)
