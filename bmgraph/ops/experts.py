"""A linear with the weights of the experts that the router selects for each token, in float and in quantized forms.

A mixture-of-experts feed-forward is `experts_linear`, an activation, `experts_linear`, and a sum over the selected
experts; a gated one starts with two `experts_linear`. Experts that no token selects cost nothing.

Shapes: T any leading axes, K experts selected per token, E experts in all, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bmgraph.ops.block_codes import block_size, dequantize_blocks
from bmgraph.ops.trait_row import Dims, Flops, Kind, Lookup, Traits


@torch.library.custom_op("bmgraph::experts_linear", mutates_args=())
def experts_linear(
    x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x f[T, I] or f[T, K, I], weight f[E, O, I], ids i64[T, K], bias f[E, O] or None -> f[T, K, O].

    Computes `x @ weight[id].T + bias[id]` for each id. x of [T, I] is shared by all experts of a token; x of
    [T, K, I] has one row per expert.
    """
    output = x.new_empty(*ids.shape, weight.shape[1])
    output_rows = output.reshape(-1, weight.shape[1])
    input_rows, shared = _rows(x, ids)
    for expert, positions in _positions_by_expert(ids):
        selected = input_rows[positions // ids.shape[-1] if shared else positions]
        output_rows[positions] = torch.nn.functional.linear(
            selected, weight[expert], None if bias is None else bias[expert]
        )
    return output


@experts_linear.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return x.new_empty(*ids.shape, weight.shape[1])


ZERO = 128
"""The u8 code that stands for 0 in weights."""


@torch.library.custom_op("bmgraph::experts_linear_blocks", mutates_args=())
def experts_linear_blocks(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    features: int,
    rounded: bool,
    zero: torch.Tensor | None = None,
) -> torch.Tensor:
    """`experts_linear` with `features` inputs (I), and weights in packed codes of `bits` bits (`bmgraph.ops.block_codes`).

    codes u8[E, O, B, bytes], scale f[E, O, B], zero u8[E, O, ceil(B * bits / 8)] or None for B = ceil(I / S) blocks of S inputs, the last one padded. If `rounded`, x is
    quantized by blocks of S too (`quantize_blocks`).
    """
    entering = torch.ops.bmgraph.quantize_blocks(x, block_size(codes, bits)) if rounded else x
    weight = dequantize_blocks(codes, scale, bits, features, zero)
    output: torch.Tensor = experts_linear(entering, weight, ids, bias)
    return output


@experts_linear_blocks.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    features: int,
    rounded: bool,
    zero: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty(*ids.shape, codes.shape[1])


@torch.library.custom_op("bmgraph::experts_linear_rounded", mutates_args=())
def experts_linear_rounded(
    x: torch.Tensor,
    step: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    rows: bool = False,
) -> torch.Tensor:
    """`experts_linear` of quantized x, with weights of codes i8[E, O, I] and scale f[E, O].

    x is rounded by `quantize_static` with scale `step` f[] and `zero_point`; if `step` is None, by `quantize_dynamic`, or,
    if `rows`, each row by a scale of its own (`quantize_blocks` of I values).
    """
    ops = torch.ops.bmgraph
    if rows:
        rounded = ops.quantize_blocks(x, x.shape[-1])
    else:
        rounded = ops.quantize_dynamic(x) if step is None else ops.quantize_static(x, step, zero_point)
    output: torch.Tensor = experts_linear(rounded, codes.to(x.dtype) * scale.unsqueeze(-1), ids, bias)
    return output


@experts_linear_rounded.register_fake
def _(
    x: torch.Tensor,
    step: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    rows: bool = False,
) -> torch.Tensor:
    return x.new_empty(*ids.shape, codes.shape[1])


@torch.library.custom_op("bmgraph::experts_outer", mutates_args=())
def experts_outer(gradient: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Gradient of the weight of `experts_linear`: gradient f[T, K, O], x as there, ids i64[T, K] -> f[E, O, I].

    `count` is E; the gradient of an expert that no token selects is zero.
    """
    output = x.new_zeros(count, gradient.shape[-1], x.shape[-1])
    gradient_rows = gradient.reshape(-1, gradient.shape[-1])
    input_rows, shared = _rows(x, ids)
    for expert, positions in _positions_by_expert(ids):
        selected = input_rows[positions // ids.shape[-1] if shared else positions]
        output[expert] = gradient_rows[positions].T @ selected
    return output


@experts_outer.register_fake
def _(gradient: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, count: int) -> torch.Tensor:
    return x.new_empty(count, gradient.shape[-1], x.shape[-1])


def is_shared(x: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether x is f[T, I], so that all experts of a token read the same row."""
    return x.dim() == ids.dim()


def _rows(x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """x with its leading axes flattened, and whether the experts of a token share a row."""
    return x.reshape(-1, x.shape[-1]), is_shared(x, ids)


def _positions_by_expert(ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Each selected expert with its positions in the flattened ids."""
    flat = ids.reshape(-1)
    order, start = flat.argsort(stable=True), 0
    for expert, count in enumerate(torch.bincount(flat).tolist()):
        if count:
            yield expert, order[start : start + count]
        start += count


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, ids, bias = inputs
    ctx.save_for_backward(x, weight, ids)
    ctx.has_bias = bias is not None


def _gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, ids = ctx.saved_tensors
    x_gradient = weight_gradient = bias_gradient = None
    if ctx.needs_input_grad[0]:
        x_gradient = torch.ops.bmgraph.experts_linear(gradient, weight.transpose(1, 2), ids)
        x_gradient = x_gradient.sum(-2) if is_shared(x, ids) else x_gradient
    if ctx.needs_input_grad[1]:
        weight_gradient = torch.ops.bmgraph.experts_outer(gradient, x, ids, weight.shape[0])
    if ctx.has_bias and ctx.needs_input_grad[3]:
        zeros = gradient.new_zeros(weight.shape[0], weight.shape[1])
        bias_gradient = zeros.index_add(0, ids.reshape(-1), gradient.reshape(-1, weight.shape[1]))
    return x_gradient, weight_gradient, None, bias_gradient


experts_linear.register_autograd(_gradients, setup_context=_save_inputs)

TRAITS: dict[Any, Traits] = {
    torch.ops.bmgraph.experts_linear: Traits(Kind.EXPERTS, Dims.EXPERTS, Lookup.EXPERTS, Flops.EXPERTS),
    torch.ops.bmgraph.experts_linear_blocks: Traits(dims=Dims.EXPERTS),
    torch.ops.bmgraph.experts_linear_rounded: Traits(dims=Dims.EXPERTS),
}
"""The rows of these operators."""
