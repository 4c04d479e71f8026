"""Scales by the least square error of the values that share them: a few of the largest values may be clipped."""

from __future__ import annotations

from collections.abc import Callable

import torch

ScaleRule = Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]
"""(values f[..., n] that share a scale, the scales f[...] that their largest ones fill, least code, largest code) -> scales f[...],
each at least LEAST_SHARE of those given, and no larger."""

LEAST_SHARE = 0.5
"""The least share of the largest value that codes may span."""

SHARES = tuple(1 - 0.02 * step for step in range(26))
"""The shares that are tried."""


def mse_scales(values: torch.Tensor, widest: torch.Tensor, least: int, most: int) -> torch.Tensor:
    """The scale, among SHARES of the widest, with the least sum of squared errors of rounded values.

    Source: the search of scales in Banner et al. 2019 (arXiv:1810.05723) and Nagel et al. 2021 (arXiv:2106.08295, section 3.1).
    """
    best, scale = torch.full_like(widest, torch.inf), widest
    for share in SHARES:
        tried = widest * share
        error = (rounded(values, tried, least, most) - values).square_().sum(-1)
        scale = torch.where(error < best, tried, scale)
        best = torch.minimum(best, error)
    return scale


def rounded(values: torch.Tensor, scale: torch.Tensor, least: int, most: int) -> torch.Tensor:
    """Values f[..., n] at their nearest codes, times scales f[...]."""
    steps = scale.unsqueeze(-1)
    return torch.clamp(torch.round(values / steps), least, most).mul_(steps)
