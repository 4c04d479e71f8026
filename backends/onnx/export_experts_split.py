"""Products with each expert apart in ONNX: rows in the order of their experts, each weight read by those that chose it.

Weights stay where they are, for any number of tokens, and an expert that nobody chose multiplies no rows. Beside its
product an expert costs nothing: one sorting, one splitting and one concatenation serve all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bmgraph.backends.onnx import contrib_ops as microsoft

FLOATS, INTEGERS = 1, 4
"""How ONNX Runtime multiplies by blocks of codes: in floats; by integers, with its rows rounded by the same blocks."""

Product = Callable[[Any, Any], Any]
"""(rows that chose an expert, the expert's number) -> what they give."""


def apart_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator -> its form with each expert apart."""
    from onnxscript import opset23

    op: Any = opset23
    integer_product, block_product = microsoft.integer_product(), microsoft.block_product()

    def numbers(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    def of(expert: Any, tensor: Any) -> Any:
        """One expert's part of what is stacked."""
        return None if tensor is None else op.Gather(tensor, expert, axis=0)

    def split(rows: Any, counts: Any, experts: int) -> list[Any]:
        if experts == 1:
            return [rows]
        parts = op.Split(rows, counts, axis=0, num_outputs=experts)
        # The recorder asks for the number of parts, where ONNX takes that or their sizes.
        del parts[0].producer().attributes["num_outputs"]
        return list(parts)

    def apart(entering: Any, shared: bool, ids: Any, sizes: Sequence[int], product: Product) -> Any:
        """What enters, [T, I] where it is shared by all that a token chose, else [T, K, I]; ids [T, K]; sizes E, O, I ->
        [T, K, O]."""
        experts, outputs, features = sizes
        flat = op.Reshape(ids, numbers(-1))
        size = op.Shape(flat)
        _, order = op.TopK(flat, size, axis=0, largest=0)
        _, back = op.TopK(order, size, axis=0, largest=0)
        chose = op.OneHot(flat, numbers(experts), numbers(0, 1), axis=-1)
        counts = op.ReduceSum(chose, numbers(0), keepdims=0)
        places = op.Div(order, op.Constant(value_int=ids.shape[-1])) if shared else order
        rows = op.Gather(op.Reshape(entering, numbers(-1, features)), places, axis=0)
        parts = enumerate(split(rows, counts, experts))
        made = op.Concat(*(product(part, op.Constant(value_int=expert)) for expert, part in parts), axis=0)
        return op.Reshape(op.Gather(made, back, axis=0), op.Concat(op.Shape(ids), numbers(outputs), axis=0))

    def is_shared(x: Any, ids: Any) -> bool:
        return len(x.shape) == len(ids.shape)

    def experts_linear(x: Any, weight: Any, ids: Any, bias: Any = None) -> Any:
        def product(rows: Any, expert: Any) -> Any:
            return op.Gemm(rows, of(expert, weight), of(expert, bias), transB=1)

        return apart(x, is_shared(x, ids), ids, weight.shape, product)

    def experts_linear_rounded(
        x: Any, step: Any, zero_point: Any, weight: Any, scale: Any, ids: Any, bias: Any = None
    ) -> Any:
        if step is None:
            codes, step, zero_point = op.DynamicQuantizeLinear(x)
        else:
            codes = op.QuantizeLinear(x, step, zero_point)

        def product(rows: Any, expert: Any) -> Any:
            matrix = op.Transpose(of(expert, weight), perm=[1, 0])
            scales = of(expert, scale)
            return integer_product(rows, matrix, step, scales, zero_point, None, of(expert, bias))

        return apart(codes, is_shared(x, ids), ids, weight.shape, product)

    def experts_linear_blocks(
        x: Any, weight: Any, scale: Any, ids: Any, bias: Any, features: int, rounded: bool
    ) -> Any:
        experts, outputs, _, block = weight.shape
        how = {"bits": 8, "block_size": block, "accuracy_level": INTEGERS if rounded else FLOATS}

        def product(rows: Any, expert: Any) -> Any:
            beside = (of(expert, weight), of(expert, scale), None, None, of(expert, bias))
            return block_product(rows, *beside, K=features, N=outputs, **how)

        return apart(x, is_shared(x, ids), ids, (experts, outputs, features), product)

    ours = torch.ops.bmgraph
    return {
        ours.experts_linear.default: experts_linear,
        ours.experts_linear_blocks.default: experts_linear_blocks,
        ours.experts_linear_rounded.default: experts_linear_rounded,
    }
