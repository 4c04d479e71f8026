"""Coordinate descent behind GPTQ (QuantEase, Behdin et al. 2023, arXiv:2309.01885): each code is the best one, given all others."""

from __future__ import annotations

import torch

from bmgraph.pass_manager.layer_sites import damped
from bmgraph.passes.quantize.block_codes import BlockCodes
from bmgraph.passes.quantize.code_grid import CodeGrid, bounded
from bmgraph.passes.quantize.gptq import ROWS, gptq

SWEEPS = 3
"""How often scales are fitted, and all codes chosen again."""

COLUMNS = 64
"""Columns after which all others are brought up to date."""

RIDGE = 1e-4
"""How much a fitted scale is held to the one before, as a share of the mean curvature of the scales of its output."""

FARTHEST = 1.5
"""The largest ratio of a fitted scale to the one before, and of that to it."""


def quantease(form: BlockCodes, weight: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, CodeGrid]:
    """Codes i8[N, K] and grids [N, B] of a weight f[N, K], given `second` f64[K, K], X^T X of its inputs X.

    Rows of X are divided by their norms before (`alike` in `schemes.py`): of a small language model held-out rows then lose a tenth less, relative to each.
    It begins with the codes of GPTQ. In turn the scales of an output are fitted all at once, by least squares at its codes, zero points
    move by one code where that lets values reach farther, and the codes of one column after the other are the best ones at these
    scales, given the codes of all others. None of it makes the error of the outputs, damped as in GPTQ, larger.
    """
    codes, grid = gptq(form, weight, second)
    moments = damped(second).float()
    for first in range(0, len(weight), ROWS):
        rows = slice(first, first + ROWS)
        part = weight[rows].float()
        for _ in range(SWEEPS):
            own = grid.of(rows).typed(torch.float32)
            fitted = fitted_scales(form, part, codes[rows], own, moments)
            grid.scale[rows] = fitted.to(weight.dtype)
            own = grid.of(rows).typed(torch.float32)
            if not form.symmetric:
                codes[rows], own = moved_zeros(form, part, codes[rows], own, moments)
                grid.set(rows, own)
            codes[rows] = descended(form, part, codes[rows], own, moments)
    return codes, grid


def fitted_scales(
    form: BlockCodes, weight: torch.Tensor, codes: torch.Tensor, grid: CodeGrid, moments: torch.Tensor
) -> torch.Tensor:
    """The scales f[N, B] with the least error e M e^T of each output, e = weight - value, value = (codes - zeros) * scales,
    M = `moments` f[K, K].

    Where they would be farther than FARTHEST from the given ones, or not be better, these stay.
    """
    outputs, count = grid.scale.shape
    left = count * form.block - weight.shape[1]
    second = torch.nn.functional.pad(moments, (0, left, 0, left))
    blocks = form.in_blocks(form.steps(codes, grid))
    wanted = form.in_blocks(weight @ moments)
    curvature = torch.empty(outputs, count, count, dtype=torch.float64, device=weight.device)
    for index in range(count):
        span = slice(index * form.block, (index + 1) * form.block)
        curvature[:, index] = ((blocks[:, index] @ second[span]).reshape(blocks.shape) * blocks).sum(-1)
    slope = (wanted * blocks).sum(-1).double()
    old = grid.scale.double()
    held = RIDGE * curvature.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).clamp(min=1e-30)
    fitted = torch.linalg.solve(curvature + torch.diag_embed(held.expand_as(old)), slope + held * old)
    ratio = fitted / old
    fitted = torch.where((ratio > 1 / FARTHEST) & (ratio < FARTHEST), fitted, old)

    def error(steps: torch.Tensor) -> torch.Tensor:
        bent = (curvature @ steps.unsqueeze(-1)).squeeze(-1)
        return ((bent - 2 * slope) * steps).sum(-1, keepdim=True)

    return torch.where(error(fitted) < error(old), fitted, old).float()


def moved_zeros(
    form: BlockCodes, weight: torch.Tensor, codes: torch.Tensor, grid: CodeGrid, moments: torch.Tensor
) -> tuple[torch.Tensor, CodeGrid]:
    """Codes i8[N, K] and grids [N, B] with zero points one code lower or higher where the error of outputs becomes less by it.

    Values stay at their steps, but for two ends of a block: those that the moved codes no longer reach come back by one step, and
    of those at the other end, where there is one more now, the ones whose best step lies beyond go there.
    """
    columns = weight.shape[1]
    scales = form.by_column(grid, columns).scale.T.contiguous()
    steps, diagonal = form.steps(codes, grid).T.contiguous(), moments.diagonal()[:, None]
    slope = moments @ (weight.T - steps * scales)
    assert grid.zero is not None
    zeros = grid.zero.clone()
    for block in range(zeros.shape[1]):
        span = slice(block * form.block, min((block + 1) * form.block, columns))
        own, scale = moments[span, span], scales[span]
        for shift in (-1, 1):
            before, zero = zeros[:, block], (zeros[:, block] + shift).clamp(form.least, form.most)
            opened = steps[span] == (form.most if shift < 0 else form.least) - before
            best = torch.round(steps[span] + slope[span] / (diagonal[span] * scale))
            new = bounded(torch.where(opened, best, steps[span]), zero, form.least, form.most)
            moved = (new - steps[span]) * scale
            better = (moved * (own @ moved - 2 * slope[span])).sum(0) < 0
            zeros[:, block] = torch.where(better, zero, before)
            steps[span] = torch.where(better, new, steps[span])
            slope.addmm_(moments[:, span], torch.where(better, moved, 0.0), alpha=-1)
    found = CodeGrid(grid.scale, zeros)
    shifts = form.by_column(found, columns).zero
    assert shifts is not None
    return (steps.T + shifts).to(torch.int8), found


def descended(
    form: BlockCodes, weight: torch.Tensor, codes: torch.Tensor, grid: CodeGrid, moments: torch.Tensor
) -> torch.Tensor:
    """The codes i8[N, K] after one sweep over the columns, each of which gets the best codes, given all others."""
    columns = weight.shape[1]
    scales, zeros = (None if item is None else item.T.contiguous() for item in form.by_column(grid, columns))
    assert scales is not None
    value = form.steps(codes, grid).T * scales
    slope = moments @ (weight.T - value)  # half of how fast the error falls as a column grows
    found = torch.empty_like(codes.T, memory_format=torch.contiguous_format)
    for begin in range(0, columns, COLUMNS):
        end = min(begin + COLUMNS, columns)
        moved = torch.empty_like(value[begin:end])
        for column in range(begin, end):
            best = value[column] + slope[column] / moments[column, column]
            zero = None if zeros is None else zeros[column]
            steps = bounded(best / scales[column], zero, form.least, form.most)
            found[column] = (steps if zero is None else steps + zero).to(torch.int8)
            moved[column - begin] = steps * scales[column] - value[column]
            slope[begin:end].addr_(moments[begin:end, column], moved[column - begin], alpha=-1)
        slope[:begin].addmm_(moments[:begin, begin:end], moved, alpha=-1)
        slope[end:].addmm_(moments[end:, begin:end], moved, alpha=-1)
    return found.T.contiguous()
