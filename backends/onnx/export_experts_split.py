"""ONNX translations of expert operators with one product per expert: rows are sorted and split by expert.

Nothing copies weights, whatever the number of tokens, and an expert that no token chose multiplies no rows. The overhead
per expert is its product alone: one sort, one split and one concatenation serve all experts.

Shapes: T any leading sizes, K experts chosen per token, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from bmgraph.backends.onnx import contrib_ops
from bmgraph.ops.block_codes import block_size
from bmgraph.ops.experts import ZERO
from bmgraph.ops.quantization import BLOCK_TOP

FLOATS, INTEGERS = 1, 4
"""`accuracy_level` of MatMulNBits: multiply floats; or integers, with rows quantised by the same blocks as weights."""

SMALLEST_STEP = 1e-30
"""The step of a row of zeros: any number above 0."""

Product = Callable[[Any, Any], Any]
"""(rows that chose an expert, the expert's index) -> the product of the rows with its weight."""


def split_translations() -> dict[Callable[..., object], Callable[..., object]]:
    """Translations of `experts_linear`, `experts_linear_blocks` and `experts_linear_rounded`."""
    from onnxscript import opset23

    ours = torch.ops.bmgraph
    return {
        ours.experts_linear.default: _experts_linear(opset23),
        ours.experts_linear_rounded.default: _experts_linear_rounded(opset23),
    } | block_product_translations()


def block_product_translations() -> dict[Callable[..., object], Callable[..., object]]:
    """The translation of `experts_linear_blocks`, which has no other form: no kernel gathers codes of blocks."""
    from onnxscript import opset23

    return {torch.ops.bmgraph.experts_linear_blocks.default: _experts_linear_blocks(opset23)}


def _experts_linear(op: Any) -> Callable[..., Any]:
    def experts_linear(x: Any, weight: Any, ids: Any, bias: Any = None) -> Any:
        def product(rows: Any, expert: Any) -> Any:
            return op.Gemm(rows, _select(op, weight, expert), _select(op, bias, expert), transB=1)

        return _for_each_expert(op, x, _is_shared(x, ids), ids, weight.shape, product)

    return experts_linear


def _experts_linear_rounded(op: Any) -> Callable[..., Any]:
    integer_product = contrib_ops.matmul_integer_to_float()

    def by_tensor(x: Any, step: Any, zero_point: Any, weight: Any, scale: Any, ids: Any, bias: Any) -> Any:
        if step is None:
            codes, step, zero_point = op.DynamicQuantizeLinear(x)
        else:
            codes = op.QuantizeLinear(x, step, zero_point)

        def product(rows: Any, expert: Any) -> Any:
            matrix = op.Transpose(_select(op, weight, expert), perm=[1, 0])
            scales = _select(op, scale, expert)
            return integer_product(rows, matrix, step, scales, zero_point, None, _select(op, bias, expert))

        return _for_each_expert(op, codes, _is_shared(x, ids), ids, weight.shape, product)

    def by_rows(x: Any, weight: Any, scale: Any, ids: Any, bias: Any) -> Any:
        one, zero = op.Constant(value_float=1.0), op.Constant(value=ir.tensor(np.array(ZERO, np.uint8)))

        def product(rows: Any, expert: Any) -> Any:
            matrix = op.Transpose(_select(op, weight, expert), perm=[1, 0])
            return integer_product(rows, matrix, one, _select(op, scale, expert), zero, None, None)

        order = _Order(op, ids, weight.shape[0])
        shared, features = _is_shared(x, ids), weight.shape[2]
        wide = x if x.dtype == ir.DataType.FLOAT else op.Cast(x, to=ir.DataType.FLOAT)
        flat = op.Reshape(wide, _ints(op, -1, features))
        if shared:  # codes are fewer bytes to sort than floats
            codes, steps = (order.sort(item, shared) for item in _row_codes(op, flat))
        else:
            codes, steps = _row_codes(op, order.sort(flat, shared))
        sums = op.Mul(order.products(codes, product), steps)
        if bias is not None:
            sums = op.Add(sums, op.Gather(bias, order.experts, axis=0))
        restored = order.restore(sums, weight.shape[1])
        return restored if x.dtype == ir.DataType.FLOAT else op.CastLike(restored, x)

    def experts_linear_rounded(
        x: Any, step: Any, zero_point: Any, weight: Any, scale: Any, ids: Any, bias: Any = None, rows: bool = False
    ) -> Any:  # fmt: skip
        if rows:
            return by_rows(x, weight, scale, ids, bias)
        return by_tensor(x, step, zero_point, weight, scale, ids, bias)

    return experts_linear_rounded


def _row_codes(op: Any, rows: Any) -> tuple[Any, Any]:
    """u8[R, I] codes of rows f32[R, I] around ZERO, and the step f32[R, 1] of each row."""
    largest = op.ReduceMax(op.Abs(rows), _ints(op, -1), keepdims=0)
    step = op.Div(largest, op.Constant(value_float=float(BLOCK_TOP)))
    step = op.Max(step, op.Constant(value_float=SMALLEST_STEP))
    zeros = op.Expand(op.Constant(value=ir.tensor(np.array(ZERO, np.uint8))), op.Shape(step))
    return op.QuantizeLinear(rows, step, zeros, axis=0), op.Unsqueeze(step, _ints(op, -1))


def _experts_linear_blocks(op: Any) -> Callable[..., Any]:
    block_product = contrib_ops.matmul_nbits()

    def experts_linear_blocks(
        x: Any,
        weight: Any,
        scale: Any,
        ids: Any,
        bias: Any,
        bits: int,
        features: int,
        rounded: bool,
        zero: Any = None,
    ) -> Any:
        experts, outputs, _, _ = weight.shape
        level = INTEGERS if rounded else FLOATS
        attributes = {"bits": bits, "block_size": block_size(weight, bits), "accuracy_level": level}

        def product(rows: Any, expert: Any) -> Any:
            codes, scales = _select(op, weight, expert), _select(op, scale, expert)
            zeros, bias_row = _select(op, zero, expert), _select(op, bias, expert)
            return block_product(
                rows, codes, scales, zeros, None, bias_row, K=features, N=outputs, **attributes
            )

        return _for_each_expert(op, x, _is_shared(x, ids), ids, (experts, outputs, features), product)

    return experts_linear_blocks


def _is_shared(x: Any, ids: Any) -> bool:
    """Whether all experts of a token read the same input."""
    return len(x.shape) == len(ids.shape)


def _for_each_expert(
    op: Any, inputs: Any, shared: bool, ids: Any, sizes: Sequence[int], product: Product
) -> Any:
    """Apply `product` to each expert and the rows that chose it, and restore the order of tokens.

    inputs [T, I] if `shared` by a token's experts, else [T, K, I]; ids [T, K]; sizes (E, O, I) -> [T, K, O].
    """
    experts, outputs, features = sizes
    order = _Order(op, ids, experts)
    rows = order.sort(op.Reshape(inputs, _ints(op, -1, features)), shared)
    return order.restore(order.products(rows, product), outputs)


class _Order:
    """Rows [R, ...] sorted by expert: R = T * K, `experts` i64[R] says the expert of each."""

    def __init__(self, op: Any, ids: Any, experts: int) -> None:
        """The order for ids [T, K] of `experts` experts."""
        self._op, self._ids, self._count = op, ids, experts
        flat = op.Reshape(ids, _ints(op, -1))
        size = op.Shape(flat)
        self.experts, self._order = op.TopK(flat, size, axis=0, largest=0)
        _, self._inverse = op.TopK(self._order, size, axis=0, largest=0)
        one_hot = op.OneHot(flat, _ints(op, experts), _ints(op, 0, 1), axis=-1)
        self._counts = op.ReduceSum(one_hot, _ints(op, 0), keepdims=0)

    def sort(self, rows: Any, shared: bool) -> Any:
        """Sorted rows, of [T, ...] if `shared` by a token's experts, else of [R, ...]."""
        op = self._op
        indices = op.Div(self._order, op.Constant(value_int=self._ids.shape[-1])) if shared else self._order
        return op.Gather(rows, indices, axis=0)

    def products(self, rows: Any, product: Product) -> Any:
        """The product of each sorted row with its expert, [R, O]."""
        op = self._op
        parts = enumerate(_split(op, rows, self._counts, self._count))
        return op.Concat(*(product(part, op.Constant(value_int=expert)) for expert, part in parts), axis=0)

    def restore(self, rows: Any, outputs: int) -> Any:
        """Sorted rows [R, O] as [T, K, O]."""
        op = self._op
        restored = op.Gather(rows, self._inverse, axis=0)
        return op.Reshape(restored, op.Concat(op.Shape(self._ids), _ints(op, outputs), axis=0))


def _ints(op: Any, *values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _select(op: Any, stacked: Any, expert: Any) -> Any:
    """One expert's slice of a stacked tensor; None for None."""
    return None if stacked is None else op.Gather(stacked, expert, axis=0)


def _split(op: Any, rows: Any, counts: Any, experts: int) -> list[Any]:
    """The sorted rows of each expert."""
    if experts == 1:
        return [rows]
    parts = op.Split(rows, counts, axis=0, num_outputs=experts)
    # onnxscript needs num_outputs to know how many values to return; ONNX forbids it next to sizes.
    del parts[0].producer().attributes["num_outputs"]
    return list(parts)
