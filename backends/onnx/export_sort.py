"""ONNX translations of stable sorts: TopK of all values, which lets the lower index of equal values come first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch

aten = torch.ops.aten


def sort_translations() -> dict[Callable[..., object], Callable[..., object]]:
    """`sort` and `argsort` with `stable=True` -> their ONNX translations.

    ONNX Runtime's TopK takes f32, f64, i32 and i64; other types are compared in a wider one, which keeps their order.
    """
    from onnxscript import opset23

    op: Any = opset23
    wider = {
        ir.DataType.FLOAT16: ir.DataType.FLOAT, ir.DataType.BFLOAT16: ir.DataType.FLOAT, ir.DataType.BOOL: ir.DataType.INT32,
        ir.DataType.INT8: ir.DataType.INT32, ir.DataType.INT16: ir.DataType.INT32, ir.DataType.UINT8: ir.DataType.INT32,
    }  # fmt: skip

    def sort(x: Any, stable: bool | None = True, dim: int = -1, descending: bool = False) -> Any:
        if not len(x.shape):
            return op.Identity(x), op.Constant(value_int=0)
        wide = op.Cast(x, to=wider[x.dtype]) if x.dtype in wider else x
        axis = op.Constant(value_ints=[dim])
        count = op.Gather(op.Shape(x), axis, axis=0)
        values, indices = op.TopK(wide, count, axis=dim, largest=int(descending), sorted=1)
        return (op.Cast(values, to=x.dtype) if x.dtype in wider else values), indices

    def argsort(x: Any, stable: bool | None = True, dim: int = -1, descending: bool = False) -> Any:
        return sort(x, stable, dim, descending)[1]

    return {aten.sort.stable: sort, aten.argsort.stable: argsort}
