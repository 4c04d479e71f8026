"""Scales by the least square error of the values that share them: a few of the largest values may be clipped."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bmgraph.passes.quantize.code_grid import CodeGrid, rounded

ScaleRule = Callable[[torch.Tensor, CodeGrid, int, int], CodeGrid]
"""(values f[..., n] that share a scale, the grid [...] that covers them, least code, largest code) -> a grid, whose scales are
at least LEAST_SHARE of those given, and no larger, and zero points, where there are some, at most one step from those given."""

LEAST_SHARE = 0.5
"""The least share of the largest value that codes may span."""

SHARES = tuple(1 - 0.02 * step for step in range(26))
"""The shares that are tried."""


def mse_scales(values: torch.Tensor, widest: CodeGrid, least: int, most: int) -> CodeGrid:
    """The grid, at SHARES of the widest one's steps, with the least sum of squared errors of rounded values.

    Source: the search of scales in Banner et al. 2019 (arXiv:1810.05723) and Nagel et al. 2021 (arXiv:2106.08295, section 3.1).
    """
    best, found = torch.full_like(widest.scale, torch.inf), widest
    for tried in widest.smaller(SHARES, least, most):
        error = (rounded(values, tried, least, most) - values).square_().sum(-1)
        found = tried.where(error < best, found)
        best = torch.minimum(best, error)
    return found
