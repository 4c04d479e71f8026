"""HQQ (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"): scales without data that outliers move little."""

from __future__ import annotations

import torch

from bmgraph.passes.quantize.mse import LEAST_SHARE

STEPS, NORM, BETA, GROWTH = 20, 0.7, 10.0, 1.01
"""Iterations; the power p of errors that are summed; the weight of the quadratic term at first, and how it grows (all of the paper)."""


def hqq_scales(values: torch.Tensor, widest: torch.Tensor, least: int, most: int) -> torch.Tensor:
    """The scale with the least sum of |error| ** NORM that half-quadratic steps reach from the widest.

    Each step takes errors, shrunk towards zero, out of the values (they stand for outliers) and fits what is left. The paper
    fits zero points at fixed scales; these codes are symmetric, so the scale is fitted by least squares. Errors are counted in
    steps of the widest scale.
    """
    unit = widest.unsqueeze(-1)
    known, share = values / unit, torch.ones_like(widest)
    best, found, beta = torch.full_like(widest, torch.inf), share, BETA
    for _ in range(STEPS):
        steps = share.unsqueeze(-1)
        codes = torch.clamp(torch.round(known / steps), least, most)
        lost = known - codes * steps
        size = lost.abs()
        error = size.pow(NORM).sum(-1)
        found = torch.where(error < best, share, found)
        best = torch.minimum(best, error)
        outlying = lost.sign() * torch.relu(size - size.clamp(min=1e-8).pow(NORM - 1) / beta)
        squares = codes.square().sum(-1)
        fitted = (codes * (known - outlying)).sum(-1) / squares.clamp(min=1.0)
        share = torch.where(squares > 0, fitted, share).clamp(LEAST_SHARE, 1.0)
        beta *= GROWTH
    return widest * found
