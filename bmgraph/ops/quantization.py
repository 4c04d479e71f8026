"""Operators of a quantised program: float in and out, they compute what the target's integers will give.

`bmgraph::dequantize` makes a weight from its codes; `bmgraph::quantize_static`, `bmgraph::quantize_dynamic` and
`bmgraph::quantize_blocks` round an activation to 8 bits and back. Gradients go straight through the rounding, where nothing was clipped
(Bengio et al. 2013, straight-through estimator).
"""

from __future__ import annotations

from typing import Any

import torch

LOW, HIGH = 0, 255
"""The range of the codes (u8) of an activation that is scaled at each call."""

BLOCK_TOP = 127
"""The largest code (s8) of an activation that is scaled by blocks."""


@torch.library.custom_op("bmgraph::dequantize", mutates_args=())
def dequantize(codes: torch.Tensor, scale: torch.Tensor, axis: int) -> torch.Tensor:
    """codes i8[...] * scale f[n], with one scale for each index of dimension `axis` (n long). A scale of several dimensions
    runs over those that end with `axis`: f[E, n] with axis 1 for the codes of E experts."""
    first = axis + 1 - scale.dim()
    shape = [1] * first + list(scale.shape) + [1] * (codes.dim() - 1 - axis)
    return codes.to(scale.dtype) * scale.reshape(shape)


@dequantize.register_fake
def _(codes: torch.Tensor, scale: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


def _keep_codes(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    codes, scale, axis = inputs
    ctx.save_for_backward(codes)
    ctx.scaled = range(axis + 1 - scale.dim(), axis + 1)


def _scale_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None]:
    (codes,) = ctx.saved_tensors
    others = [axis for axis in range(codes.dim()) if axis not in ctx.scaled]
    return None, (gradient * codes.to(gradient.dtype)).sum(others), None


dequantize.register_autograd(_scale_gradient, setup_context=_keep_codes)


@torch.library.custom_op("bmgraph::quantize_static", mutates_args=())
def quantize_static(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """x f[...] rounded to codes round(x / scale) + zero_point and back; scale f[], zero_point u8[] or s8[].

    The codes have the dtype of the zero point, and saturate at its ends.
    """
    offset = zero_point.to(x.dtype)
    ends = torch.iinfo(zero_point.dtype)
    return (torch.clamp(torch.round(x / scale) + offset, ends.min, ends.max) - offset) * scale


@quantize_static.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _keep_inside(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, scale, zero_point = inputs
    codes = torch.round(x / scale) + zero_point.to(x.dtype)
    ends = torch.iinfo(zero_point.dtype)
    ctx.save_for_backward((codes >= ends.min) & (codes <= ends.max))


def _straight_inside(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    (inside,) = ctx.saved_tensors
    return gradient * inside, None, None


quantize_static.register_autograd(_straight_inside, setup_context=_keep_inside)


@torch.library.custom_op("bmgraph::quantize_dynamic", mutates_args=())
def quantize_dynamic(x: torch.Tensor) -> torch.Tensor:
    """x f[...] rounded to u8 codes over the range of the whole tensor (ONNX DynamicQuantizeLinear) and back."""
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
    """x f[..., n * block] rounded to s8 codes over the largest magnitude of every `block` values of a row, and back."""
    rows = x.reshape(*x.shape[:-1], -1, block)
    scale = rows.abs().amax(-1, keepdim=True) / BLOCK_TOP
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (torch.round(rows / safe) * safe).flatten(-2)


@quantize_blocks.register_fake
def _(x: torch.Tensor, block: int) -> torch.Tensor:
    return torch.empty_like(x)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    return None


def _straight(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
    return gradient


quantize_dynamic.register_autograd(_straight, setup_context=_keep_nothing)


def _straight_through_blocks(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    return gradient, None


quantize_blocks.register_autograd(_straight_through_blocks, setup_context=_keep_nothing)
