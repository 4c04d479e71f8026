"""ONNX forms of codes of blocks: MatMulNBits, GatherBlockQuantized, and DequantizeLinear with `block_size`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from bmgraph.backends.onnx import contrib_ops
from bmgraph.backends.onnx.rewrites.graph_utils import constant
from bmgraph.ops.block_codes import block_size, unpack_codes

EIGHT_BITS, FLOAT = 4, 1
"""Values of `accuracy_level`: the kernel rounds each block of the input to 8 bits, or computes in float32."""


def block_code_translations() -> dict[Callable[..., object], Callable[..., object]]:
    """The operators of `bmgraph.ops.block_codes` -> their translations.

    The kernels take 2 ** (bits - 1) for the code of zero where no zero points are given. DequantizeLinear takes 0: its codes are
    stored as signed ones, by `store_signed`.
    """
    from onnxscript import opset23

    op: Any = opset23
    product, lookup = contrib_ops.matmul_nbits(), contrib_ops.gather_block_quantized()

    def linear_blocks(
        x: Any, codes: Any, scale: Any, bias: Any, bits: int, columns: int, rounded: bool
    ) -> Any:
        level = EIGHT_BITS if rounded else FLOAT
        return product(
            x, codes, scale, None, None, bias, K=columns, N=int(codes.shape[0]), bits=bits, block_size=block_size(codes, bits),
            accuracy_level=level,
        )  # fmt: skip

    def embedding_blocks(codes: Any, ids: Any, scale: Any, bits: int, block: int) -> Any:
        # the kernel does not check ids; files are only loaded with these bounds
        rows = op.Clip(ids, op.Constant(value_int=0), op.Constant(value_int=int(codes.shape[0]) - 1))
        return lookup(codes, rows, scale, gather_axis=0, quantize_axis=1, block_size=block, bits=bits)

    def dequantize_blocks(codes: Any, scale: Any, bits: int, columns: int) -> Any:
        return op.DequantizeLinear(codes, scale, axis=1, block_size=block_size(codes, bits))

    ours = torch.ops.bmgraph
    return {
        ours.linear_blocks.default: linear_blocks,
        ours.embedding_blocks.default: embedding_blocks,
        ours.dequantize_blocks.default: dequantize_blocks,
    }


def store_signed(model: ir.Model) -> None:
    """Store the packed codes that a DequantizeLinear reads as signed ones [N, K] of their type, in place."""
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
        signed = unpack_codes(torch.from_numpy(packed), bits, int(weight.shape[1])).numpy()  # type: ignore[arg-type]
        kind = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
        codes.const_value = ir.tensor(signed, dtype=kind, name=codes.name)
        codes.shape, codes.type = ir.Shape(signed.shape), ir.TensorType(kind)
