"""Simulated quantization: float in, float out, with the values that the target's integer kernels compute.

`bmgraph::dequantize` makes a weight from its codes; `bmgraph::quantize_static`, `bmgraph::quantize_dynamic` and
`bmgraph::quantize_blocks` round an activation to 8 bits and back. Gradients pass through the rounding unchanged, and are
zero where `quantize_static` clips (straight-through estimator, Bengio et al. 2013). The scale of `quantize_static` has the gradient of
LSQ (Esser et al. 2020, arXiv:1902.08153), as the steps of `fake_quantization.py` do, over values of one token.
"""

from __future__ import annotations

from typing import Any

import torch

from bmgraph.ops.trait_row import Dims, Kind, Traits

LOW, HIGH = 0, 255
"""Range of the u8 codes of `quantize_dynamic`."""

BLOCK_TOP = 127
"""Largest s8 code of `quantize_blocks`."""


@torch.library.custom_op("bmgraph::dequantize", mutates_args=())
def dequantize(codes: torch.Tensor, scale: torch.Tensor, axis: int) -> torch.Tensor:
    """codes i8[...] * scale f[n] -> f[...], with one scale per index of dimension `axis`, which has size n.

    A scale of several dimensions covers the dimensions up to and including `axis`: f[E, n] with axis 1 for the codes of
    E experts.
    """
    first = axis + 1 - scale.dim()
    shape = [1] * first + list(scale.shape) + [1] * (codes.dim() - 1 - axis)
    return codes.to(scale.dtype) * scale.reshape(shape)


@dequantize.register_fake
def _(codes: torch.Tensor, scale: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


def _save_codes(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    codes, scale, axis = inputs
    ctx.save_for_backward(codes)
    ctx.scaled_dims = range(axis + 1 - scale.dim(), axis + 1)


def _scale_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None]:
    (codes,) = ctx.saved_tensors
    summed = [axis for axis in range(codes.dim()) if axis not in ctx.scaled_dims]
    return None, (gradient * codes.to(gradient.dtype)).sum(summed), None


dequantize.register_autograd(_scale_gradient, setup_context=_save_codes)


@torch.library.custom_op("bmgraph::quantize_static", mutates_args=())
def quantize_static(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """x f[...] rounded to codes round(x / scale) + zero_point and back; scale f[], zero_point u8[] or s8[].

    The codes have the dtype of the zero point, and saturate at the limits of that dtype. One of 8-bit floating-point numbers (e4m3) is 0:
    codes are then the nearest of these to x / scale.
    """
    offset = zero_point.to(x.dtype)
    codes, low, high = _unclipped_codes(x, scale, zero_point)
    return (_stored(torch.clamp(codes, low, high), zero_point.dtype) - offset) * scale


def _unclipped_codes(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
) -> tuple[torch.Tensor, float, float]:
    """x in codes that have no limits, and these; floating-point codes are not rounded yet."""
    if zero_point.dtype.is_floating_point:
        top = torch.finfo(zero_point.dtype).max
        return x / scale, -top, top
    limits = torch.iinfo(zero_point.dtype)
    return torch.round(x / scale) + zero_point.to(x.dtype), limits.min, limits.max


def _stored(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes within their limits, as they are in a type."""
    return codes.to(dtype).to(codes.dtype) if dtype.is_floating_point else codes


@quantize_static.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _save_unclipped(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, scale, zero_point = inputs
    if ctx.needs_input_grad[1]:
        ctx.save_for_backward(x, scale, zero_point)
        return
    codes, low, high = _unclipped_codes(x, scale, zero_point)
    ctx.save_for_backward((codes >= low) & (codes <= high))


def _pass_unclipped(
    ctx: Any, gradient: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    if not ctx.needs_input_grad[1]:
        (unclipped,) = ctx.saved_tensors
        return gradient * unclipped, None, None
    x, scale, zero_point = ctx.saved_tensors
    offset = zero_point.to(x.dtype)
    codes, low, high = _unclipped_codes(x, scale, zero_point)
    clipped = torch.clamp(codes, low, high)
    unclipped = codes == clipped
    slope = _stored(clipped, zero_point.dtype) - offset - torch.where(unclipped, x / scale, 0)
    moved = (gradient * slope).sum(dtype=torch.promote_types(x.dtype, torch.float32)) * (
        x.shape[-1] * high
    ) ** -0.5
    return gradient * unclipped, moved.to(scale.dtype), None


quantize_static.register_autograd(_pass_unclipped, setup_context=_save_unclipped)


@torch.library.custom_op("bmgraph::quantize_dynamic", mutates_args=())
def quantize_dynamic(x: torch.Tensor) -> torch.Tensor:
    """x f[...] rounded to u8 codes and back, scaled by the range of the whole tensor (ONNX DynamicQuantizeLinear)."""
    low = torch.clamp(x.min(), max=0.0)
    high = torch.clamp(x.max(), min=0.0)
    scale = (high - low) / (HIGH - LOW)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = torch.clamp(torch.round(LOW - low / safe), LOW, HIGH)
    return (torch.clamp(torch.round(x / safe) + zero_point, LOW, HIGH) - zero_point) * safe


@quantize_dynamic.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("bmgraph::quantize_blocks", mutates_args=())
def quantize_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """x f[..., n] rounded to s8 codes and back, with one scale per `block` values, by their largest magnitude.

    The last block is smaller where `block` does not divide n.
    """
    left = -x.shape[-1] % block
    rows = (torch.nn.functional.pad(x, (0, left)) if left else x).reshape(*x.shape[:-1], -1, block)
    scale = rows.abs().amax(-1, keepdim=True) / BLOCK_TOP
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    rounded = (torch.round(rows / safe) * safe).flatten(-2)
    return rounded[..., : x.shape[-1]].contiguous() if left else rounded


@quantize_blocks.register_fake
def _(x: torch.Tensor, block: int) -> torch.Tensor:
    return torch.empty_like(x)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    return None


def _pass_gradient(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
    return gradient


quantize_dynamic.register_autograd(_pass_gradient, setup_context=_save_nothing)


def _pass_gradient_of_blocks(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    return gradient, None


quantize_blocks.register_autograd(_pass_gradient_of_blocks, setup_context=_save_nothing)

TRAITS: dict[Any, Traits] = {
    torch.ops.bmgraph.dequantize: Traits(dims=Dims.PER_CHANNEL),
    torch.ops.bmgraph.quantize_static: Traits(
        Kind.ROUNDING, Dims.ELEMENTWISE, step="scale", codes="zero_point"
    ),
    torch.ops.bmgraph.quantize_dynamic: Traits(
        Kind.ROUNDING, Dims.RANGE, levels=HIGH - LOW, depends_on_count=True
    ),
    torch.ops.bmgraph.quantize_blocks: Traits(
        Kind.ROUNDING, Dims.BLOCKS, levels=BLOCK_TOP, depends_on_count=True
    ),
}
"""The rows of these operators."""
