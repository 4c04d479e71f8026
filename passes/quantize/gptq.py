"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): what rounding one column loses, the columns that are not rounded yet make up for."""

from __future__ import annotations

import torch

from bmgraph.pass_manager.layer_sites import inverse_root
from bmgraph.passes.quantize.block_codes import BlockCodes
from bmgraph.passes.quantize.code_grid import CodeGrid, bounded, rounded

COLUMNS = 128
"""Columns after which all later ones are brought up to date."""

ROWS = 4096
"""Outputs that are rounded at once: their columns stay in the processor's cache."""

SHARES = tuple(1.0 - 0.025 * step for step in range(11))
"""Shares of a block's largest value that its codes may span."""

WIDE_SHARES = tuple(1.0 - 0.025 * step for step in range(21))
"""Those of the whole span of a block with zero points, whose 4 codes reach both ends: the best ones leave out more."""


def gptq(form: BlockCodes, weight: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, CodeGrid]:
    """Codes i8[N, K] and grids [N, B] of a weight f[N, K], given `second` f64[K, K], X^T X of its inputs X.

    Rows of X are divided by their norms before (`alike` in `schemes.py`), which the paper does not do: else the few tokens whose
    inputs are far larger outweigh all others. With four layers of a small language model in 4 bits, logits on held-out text drift (KL)
    an eighth to a quarter less. Columns are rounded in the order of their second moments, the largest first; blocks stay where they
    are, so nothing of the
    order is left in the result. The grid of a block is the one, at SHARES of the widest one's steps (of 2-bit codes with
    zero points WIDE_SHARES), with the least error of the block by itself.
    """
    order = torch.argsort(second.diagonal(), descending=True, stable=True)
    upper = inverse_root(second[order][:, order]).float()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    grid = form.empty(weight)
    for first in range(0, len(weight), ROWS):
        rows = slice(first, first + ROWS)
        part = weight[rows].float()
        found = searched_grid(form, part, second.diagonal().float())
        grid.set(rows, found.typed(weight.dtype))
        codes[rows] = _compensated(form, part, grid.of(rows), upper, order)
    return codes, grid.typed(weight.dtype)


def searched_grid(form: BlockCodes, weight: torch.Tensor, importance: torch.Tensor) -> CodeGrid:
    """The grid of each block [N, B], at shares of the widest one's steps, with the least sum of importance[k] * error[k] ** 2."""
    blocks, weights = form.in_blocks(weight), form.in_blocks(importance[None])
    shares = WIDE_SHARES if form.bits == 2 and not form.symmetric else SHARES
    found = form.widest(weight)
    best = torch.full_like(found.scale, torch.inf)
    for tried in found.smaller(shares, form.least, form.most):
        lost = rounded(blocks, tried, form.least, form.most) - blocks
        error = (lost.square_() * weights).sum(-1)
        found = tried.where(error < best, found)
        best = torch.minimum(best, error)
    return found


def _compensated(
    form: BlockCodes, weight: torch.Tensor, grid: CodeGrid, upper: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """The codes i8[N, K] of a weight f[N, K], whose columns are rounded in `order`; `upper` is in that order, too."""
    left = weight.T[order].contiguous()
    scales, zeros = (None if item is None else item.T.contiguous()[order // form.block] for item in grid)
    assert scales is not None
    found = torch.empty(left.shape, dtype=torch.int8, device=left.device)
    for begin in range(0, len(left), COLUMNS):
        end = min(begin + COLUMNS, len(left))
        lost = torch.empty_like(left[begin:end])
        for column in range(begin, end):
            scale, zero = scales[column], None if zeros is None else zeros[column]
            steps = bounded(left[column] / scale, zero, form.least, form.most)
            found[column] = (steps if zero is None else steps + zero).to(torch.int8)
            error = (left[column] - steps * scale).div_(upper[column, column])
            left[column + 1 : end].addr_(upper[column, column + 1 : end], error, alpha=-1)
            lost[column - begin] = error
        left[end:].addmm_(upper[begin:end, end:].T, lost, alpha=-1)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    codes[:, order] = found.T
    return codes
