"""Attention by MatMul, Mul, Add, Softmax and MatMul, which OpenVINO's CPU plugin runs as one fused subgraph.

Shapes: B batch, S queries, T keys, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch

from bmgraph.backends.onnx.pack_attention import NEARLY_LEAST

HIDES: dict[ir.DataType, float] = {
    ir.DataType.FLOAT: NEARLY_LEAST * torch.finfo(torch.float32).max,
    ir.DataType.FLOAT16: NEARLY_LEAST * torch.finfo(torch.float16).max,
}
"""What is subtracted from a hidden score: any score is lost in it, and it stays finite where the plugin computes in bf16."""


def attention_translations() -> dict[Callable[..., object], Callable[..., object]]:
    """Attention on packed rows -> its translation."""
    from onnxscript import opset23

    op: Any = opset23

    def multi_head_attention(
        query: Any, key: Any, value: Any, padding: Any, heads: int, scale: float, causal: bool, blind: float | None = None
    ) -> Any:  # fmt: skip
        q, k, v = (
            op.Reshape(item, op.Constant(value_ints=[0, 0, heads, -1])) for item in (query, key, value)
        )
        scores = op.MatMul(op.Transpose(q, perm=[0, 2, 1, 3]), op.Transpose(k, perm=[0, 2, 3, 1]))
        scores = op.Mul(scores, _number(op, scale, query))
        hides = (
            HIDES[query.dtype]
            if blind is None or not math.isfinite(blind)
            else min(-blind, HIDES[query.dtype])
        )
        if padding is not None:
            real = op.Unsqueeze(op.Cast(padding, to=ir.DataType.BOOL), op.Constant(value_ints=[1, 2]))
            scores = op.Add(scores, _hidden_unless(op, real, hides, query))
        if causal:
            ones = op.Expand(_number(op, 1.0, query), op.Shape(scores, start=2))
            earlier = op.Cast(op.Trilu(ones, upper=0), to=ir.DataType.BOOL)
            scores = op.Add(scores, _hidden_unless(op, earlier, hides, query))
        attended = op.MatMul(op.Softmax(scores, axis=-1), op.Transpose(v, perm=[0, 2, 1, 3]))
        rows = op.Reshape(op.Transpose(attended, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
        if padding is None or blind is not None:
            return rows
        return op.Mul(rows, _sees_any(op, padding, query, causal))

    return {torch.ops.bmgraph.multi_head_attention.default: multi_head_attention}


def _number(op: Any, value: float, like: Any) -> Any:
    """A constant of the type of a value. Not by CastLike: the optimiser replaces it by a node that does not say its origin."""
    number = op.Constant(value_float=value)
    return number if like.dtype == ir.DataType.FLOAT else op.Cast(number, to=like.dtype)


def _hidden_unless(op: Any, seen: Any, hides: float, like: Any) -> Any:
    """What is added to scores: 0 where a key is seen, else -`hides`. Not as (seen - 1) * hides, which the plugin makes one
    multiplication and addition of, whose rounding in bf16 leaves a large number where there should be 0."""
    return op.Where(seen, _number(op, 0.0, like), _number(op, -hides, like))


def _is_real(op: Any, padding: Any, like: Any) -> Any:
    """[B, T]: 1 where a key is none of padding, else 0."""
    return op.Cast(op.Cast(padding, to=ir.DataType.BOOL), to=like.dtype)


def _sees_any(op: Any, padding: Any, like: Any, causal: bool) -> Any:
    """[B, S or 1, 1]: 0 for a query that sees no key, which gets 0, else 1."""
    real, one = _is_real(op, padding, like), op.Constant(value_ints=[1])
    if causal:
        return op.Unsqueeze(op.Sign(op.CumSum(real, op.Constant(value_int=1))), op.Constant(value_ints=[-1]))
    return op.Unsqueeze(op.ReduceMax(real, one), op.Constant(value_ints=[-1]))
