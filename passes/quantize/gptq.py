"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): what rounding one column loses, the columns that are not rounded yet make up for."""

from __future__ import annotations

import torch

from bmgraph.pass_manager.layer_sites import inverse_root
from bmgraph.passes.quantize.block_codes import BlockCodes

COLUMNS = 128
"""Columns after which all later ones are brought up to date."""

ROWS = 4096
"""Outputs that are rounded at once: their columns stay in the processor's cache."""

SHARES = tuple(1.0 - 0.025 * step for step in range(11))
"""Shares of a block's largest value that its codes may span."""


def gptq(form: BlockCodes, weight: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes i8[N, K] and scales f[N, B] of a weight f[N, K], given `second` f64[K, K], X^T X of its inputs X.

    Columns are rounded in the order of their second moments, the largest first; blocks stay where they are, so nothing of the
    order is left in the result. The scale of a block is the one of SHARES with the least error of the block by itself.
    """
    order = torch.argsort(second.diagonal(), descending=True, stable=True)
    upper = inverse_root(second[order][:, order]).float()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), -(-weight.shape[1] // form.block), device=weight.device)
    for first in range(0, len(weight), ROWS):
        rows = slice(first, first + ROWS)
        part = weight[rows].float()
        scale[rows] = searched_scales(form, part, second.diagonal().float()).to(weight.dtype).float()
        codes[rows] = _compensated(form, part, scale[rows], upper, order)
    return codes, scale.to(weight.dtype)


def searched_scales(form: BlockCodes, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """The scale of each block f[N, B], among SHARES, with the least sum of importance[k] * error[k] ** 2."""
    blocks, weights = form.in_blocks(weight), form.in_blocks(importance[None])
    widest = form.scales(weight)
    best, scale = torch.full_like(widest, torch.inf), widest
    for share in SHARES:
        tried = widest * share
        steps = tried.unsqueeze(-1)
        rounded = torch.clamp(torch.round(blocks / steps), form.least, form.most) * steps
        error = ((rounded - blocks).square_() * weights).sum(-1)
        scale = torch.where(error < best, tried, scale)
        best = torch.minimum(best, error)
    return scale


def _compensated(
    form: BlockCodes, weight: torch.Tensor, scale: torch.Tensor, upper: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """The codes i8[N, K] of a weight f[N, K], whose columns are rounded in `order`; `upper` is in that order, too."""
    left = weight.T[order].contiguous()
    steps = scale.T.contiguous()[order // form.block]
    found = torch.empty(left.shape, dtype=torch.int8, device=left.device)
    for begin in range(0, len(left), COLUMNS):
        end = min(begin + COLUMNS, len(left))
        lost = torch.empty_like(left[begin:end])
        for column in range(begin, end):
            step = steps[column]
            code = torch.clamp(torch.round(left[column] / step), form.least, form.most)
            found[column] = code.to(torch.int8)
            error = (left[column] - code * step).div_(upper[column, column])
            left[column + 1 : end].addr_(upper[column, column + 1 : end], error, alpha=-1)
            lost[column - begin] = error
        left[end:].addmm_(upper[begin:end, end:].T, lost, alpha=-1)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    codes[:, order] = found.T
    return codes
