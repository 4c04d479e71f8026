"""ONNX translations of expert operators that gather the chosen weights, or call ONNX Runtime's MoE kernels.

Shapes: T any leading sizes, K experts chosen per token, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bmgraph.backends.onnx import contrib_ops

LOGIT_GAP = 1e4
"""Distance between the logits of chosen and other experts: softmax gives the others exactly 0 in float32."""

Translations = dict[Callable[..., Any], Callable[..., Any]]
"""Operator -> the function that emits its ONNX nodes."""


def gathered_translations() -> Translations:
    """Translations of `experts_linear`, `mixture` and `mixture_int8`."""
    from onnxscript import opset23

    ours = torch.ops.bmgraph
    return {
        ours.experts_linear.default: _experts_linear(opset23),
        ours.mixture.default: _mixture(opset23),
        ours.mixture_int8.default: _mixture_int8(opset23),
    }


def _ints(op: Any, *values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _experts_linear(op: Any) -> Callable[..., Any]:
    def product(x: Any, weights: Any, ids: Any) -> Any:
        """x f[T, I] or f[T, K, I], gathered weights f[T, K, O, I] -> f[T, K, O]."""
        rows = op.Unsqueeze(x, _ints(op, -2) if len(x.shape) == len(ids.shape) else _ints(op, -1))
        if len(x.shape) == len(ids.shape):
            rows = op.Unsqueeze(rows, _ints(op, -1))
        return op.Squeeze(op.MatMul(weights, rows), _ints(op, -1))

    def experts_linear(x: Any, weight: Any, ids: Any, bias: Any = None) -> Any:
        outputs = product(x, op.Gather(weight, ids, axis=0), ids)
        return outputs if bias is None else op.Add(outputs, op.Gather(bias, ids, axis=0))

    return experts_linear


def _mixture(op: Any) -> Callable[..., Any]:
    moe = contrib_ops.moe()

    def one_hot_sum(ids: Any, experts: int) -> Any:
        """f[tokens, E]: 1 for the chosen experts, else 0."""
        flat = op.Reshape(ids, _ints(op, -1, ids.shape[-1]))
        off_on = op.Constant(value_floats=[0.0, 1.0])
        one_hot = op.OneHot(flat, op.Constant(value_ints=[experts]), off_on, axis=-1)
        return op.ReduceSum(one_hot, _ints(op, 1), keepdims=0)

    def mixture(x: Any, ids: Any, first: Any, first_bias: Any, second: Any, activation: str) -> Any:
        """The kernel weights experts by a softmax, here 1/K for each chosen one: multiply its output by K."""
        chosen = one_hot_sum(ids, first.shape[0])
        logits = op.Mul(op.Sub(chosen, op.Constant(value_float=1.0)), op.Constant(value_float=LOGIT_GAP))
        mean = moe(x, logits, first, first_bias, second, **_moe_attributes(ids.shape[-1], activation))
        return op.Mul(mean, op.Constant(value_float=float(ids.shape[-1])))

    return mixture


def _mixture_int8(op: Any) -> Callable[..., Any]:
    qmoe = contrib_ops.qmoe()

    def mixture_int8(
        x: Any, scores: Any, active: int, first: Any, first_scale: Any, first_bias: Any, second: Any, second_scale: Any,
        activation: str, block: int,
    ) -> Any:  # fmt: skip
        """The kernel selects experts by the scores, and reads their weights from another input: all 1."""
        attributes = _moe_attributes(active, activation) | {"expert_weight_bits": 8}
        if block:
            attributes["block_size"] = block
        if len(scores.shape) != 2:
            scores = op.Reshape(scores, _ints(op, -1, scores.shape[-1]))
        ones = op.Expand(op.CastLike(op.Constant(value_float=1.0), x), op.Shape(scores))
        unused = [None] * 7
        weights = (first, first_scale, first_bias, second, second_scale)
        return qmoe(x, scores, *weights, *unused, ones, **attributes)

    return mixture_int8


def _moe_attributes(active: int, activation: str) -> dict[str, Any]:
    """Attributes that MoE and QMoE share."""
    attributes = {"k": active, "activation_type": activation, "normalize_routing_weights": 0}
    if activation == "swiglu":
        attributes |= {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    return attributes
