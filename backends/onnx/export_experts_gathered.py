"""Our operators on experts in ONNX: gathered weights for any form, ONNX Runtime's kernels for packed feed-forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bmgraph.backends.onnx import contrib_ops as microsoft

FAR = 1e4
"""What softmax makes nothing of, in float32."""


def expert_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator -> its form."""
    from onnxscript import opset23

    op: Any = opset23
    moe, qmoe = microsoft.moe(), microsoft.qmoe()

    def numbers(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    def products(x: Any, weights: Any, ids: Any) -> Any:
        """Each of the weights that were gathered for the chosen multiplies its row."""
        rows = op.Unsqueeze(x, numbers(-2) if len(x.shape) == len(ids.shape) else numbers(-1))
        if len(x.shape) == len(ids.shape):
            rows = op.Unsqueeze(rows, numbers(-1))
        return op.Squeeze(op.MatMul(weights, rows), numbers(-1))

    def biased(made: Any, bias: Any, ids: Any) -> Any:
        return made if bias is None else op.Add(made, op.Gather(bias, ids, axis=0))

    def experts_linear(x: Any, weight: Any, ids: Any, bias: Any = None) -> Any:
        return biased(products(x, op.Gather(weight, ids, axis=0), ids), bias, ids)

    def choice(x: Any, ids: Any, experts: int) -> Any:
        """f[tokens, experts]: 1 where a token chose, else 0."""
        flat = op.Reshape(ids, numbers(-1, ids.shape[-1]))
        ends = op.Constant(value_floats=[0.0, 1.0])
        ones = op.OneHot(flat, op.Constant(value_ints=[experts]), ends, axis=-1)
        return op.ReduceSum(ones, numbers(1), keepdims=0)

    def options(active: int, activation: str) -> dict[str, Any]:
        made = {"k": active, "activation_type": activation, "normalize_routing_weights": 0}
        if activation == "swiglu":
            made |= {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
        return made

    def mixture(x: Any, ids: Any, first: Any, first_bias: Any, second: Any, activation: str) -> Any:
        """The kernel weights experts by a softmax: 1/k for each of the chosen, which is taken out behind it."""
        chosen = choice(x, ids, first.shape[0])
        logits = op.Mul(op.Sub(chosen, op.Constant(value_float=1.0)), op.Constant(value_float=FAR))
        made = moe(x, logits, first, first_bias, second, **options(ids.shape[-1], activation))
        return op.Mul(made, op.Constant(value_float=float(ids.shape[-1])))

    def mixture_int8(
        x: Any, scores: Any, active: int, first: Any, first_scale: Any, first_bias: Any, second: Any, second_scale: Any,
        activation: str, block: int,
    ) -> Any:  # fmt: skip
        """The kernel chooses by the scores, and takes the weights of those that it chose from another input: all 1."""
        made = options(active, activation) | {"expert_weight_bits": 8}
        if block:
            made["block_size"] = block
        if len(scores.shape) != 2:
            scores = op.Reshape(scores, numbers(-1, scores.shape[-1]))
        ones = op.Expand(op.CastLike(op.Constant(value_float=1.0), x), op.Shape(scores))
        absent = [None] * 7
        return qmoe(x, scores, first, first_scale, first_bias, second, second_scale, *absent, ones, **made)

    ours = torch.ops.bmgraph
    return {
        ours.experts_linear.default: experts_linear,
        ours.mixture.default: mixture,
        ours.mixture_int8.default: mixture_int8,
    }
