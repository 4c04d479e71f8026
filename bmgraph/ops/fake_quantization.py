"""Weights that train in codes: float in, float out, at the nearest codes of steps that train too.

N outputs, K inputs, B = ceil(K / block) blocks of inputs; a weight is f[N, K], or f[K, N] with `axis` = 1. Codes are whole numbers
from `least` to `most`. `bmgraph::fake_quantize` has one step for each output, `bmgraph::fake_quantize_blocks` one for each block of
inputs of an output. Steps may be negative, as scales of blocks are.

Gradients: those of values pass where round(x / step) is a code, and are zero where it is beyond them (straight-through estimator,
Bengio et al. 2013, arXiv:1308.3432). Those of steps are LSQ's (Esser et al. 2020, arXiv:1902.08153): the sum of `gradient * (code - x / step)`
over what shares the step, or of `gradient * code` beyond, times 1 / sqrt(n * most), n the number of values that share it.

`nearest_codes` makes the very codes, in at least float32, so what is stored is what was trained with.
"""

from __future__ import annotations

from typing import Any

import torch

from bmgraph.ops.trait_row import Dims, Traits


def in_blocks(x: torch.Tensor, axis: int, block: int) -> torch.Tensor:
    """A weight as f[N, B, block], filled up with zeros; `block` 0: all K inputs are one block."""
    rows = x.T if axis else x
    block = block or rows.shape[1]
    left = -rows.shape[1] % block
    return (torch.nn.functional.pad(rows, (0, left)) if left else rows).reshape(len(rows), -1, block)


def out_of_blocks(blocks: torch.Tensor, axis: int, columns: int) -> torch.Tensor:
    """The inverse of `in_blocks`, with K = `columns`."""
    rows = blocks.flatten(1)[:, :columns]
    return (rows.T if axis else rows).contiguous()


def wide(x: torch.Tensor) -> torch.Tensor:
    """A tensor in float32, or as it is if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_steps(x: torch.Tensor, step: torch.Tensor, axis: int, block: int) -> torch.Tensor:
    """x / step f[N, B, block]; a step that has become zero divides by 1, and gives zeros."""
    steps = wide(step).reshape(len(step), -1, 1)
    return wide(in_blocks(x, axis, block)) / torch.where(steps != 0, steps, 1)


def nearest_codes(
    x: torch.Tensor, step: torch.Tensor, axis: int, block: int, least: int, most: int
) -> torch.Tensor:
    """The nearest codes i8, in the layout of the weight."""
    codes = torch.clamp(torch.round(in_steps(x, step, axis, block)), least, most)
    return out_of_blocks(codes.to(torch.int8), axis, x.shape[1 - axis])


def _rounded(
    x: torch.Tensor, step: torch.Tensor, axis: int, block: int, least: int, most: int
) -> torch.Tensor:
    codes = torch.clamp(torch.round(in_steps(x, step, axis, block)), least, most)
    values = codes.to(step.dtype) * step.reshape(len(step), -1, 1)
    return out_of_blocks(values, axis, x.shape[1 - axis])


def step_factor(count: int, most: int) -> float:
    """LSQ's factor of a step's gradient, given how many values share the step."""
    return float((count * most) ** -0.5)


@torch.library.custom_op("bmgraph::fake_quantize", mutates_args=())
def fake_quantize(x: torch.Tensor, step: torch.Tensor, axis: int, least: int, most: int) -> torch.Tensor:
    """x f[N, K], or f[K, N] with `axis` 1, at its nearest codes times step f[N]."""
    return _rounded(x, step, axis, 0, least, most)


@fake_quantize.register_fake
def _(x: torch.Tensor, step: torch.Tensor, axis: int, least: int, most: int) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("bmgraph::fake_quantize_blocks", mutates_args=())
def fake_quantize_blocks(
    x: torch.Tensor, step: torch.Tensor, axis: int, block: int, least: int, most: int
) -> torch.Tensor:
    """x f[N, K], or f[K, N] with `axis` 1, at its nearest codes times step f[N, B] of its block."""
    return _rounded(x, step, axis, block, least, most)


@fake_quantize_blocks.register_fake
def _(x: torch.Tensor, step: torch.Tensor, axis: int, block: int, least: int, most: int) -> torch.Tensor:
    return x.new_empty(x.shape)


def _gradients(
    ctx: Any, gradient: torch.Tensor, axis: int, block: int, least: int, most: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    x, step = ctx.saved_tensors
    ratio = in_steps(x, step, axis, block)
    nearest = torch.round(ratio)
    codes = torch.clamp(nearest, least, most)
    inside = codes == nearest
    moved = torch.where(inside, in_blocks(gradient, axis, block), 0)
    found = out_of_blocks(moved, axis, x.shape[1 - axis])
    if not ctx.needs_input_grad[1]:
        return found, None
    slope = codes - torch.where(inside, ratio, 0)
    summed = (wide(in_blocks(gradient, axis, block)) * slope).sum(-1) * step_factor(ratio.shape[-1], most)
    return found, summed.reshape(step.shape).to(step.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, step, *ctx.form = inputs
    ctx.save_for_backward(x, step)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    axis, least, most = ctx.form
    return *_gradients(ctx, gradient, axis, 0, least, most), None, None, None


def _backward_of_blocks(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_gradients(ctx, gradient, *ctx.form), None, None, None, None


fake_quantize.register_autograd(_backward, setup_context=_save)
fake_quantize_blocks.register_autograd(_backward_of_blocks, setup_context=_save)

TRAITS: dict[Any, Traits] = {
    torch.ops.bmgraph.fake_quantize: Traits(dims=Dims.PER_CHANNEL),
    torch.ops.bmgraph.fake_quantize_blocks: Traits(),
}
"""The rows of these operators. How the dimensions of steps of blocks belong to those of the weight is not said: what drops channels
declines such weights."""
