"""HQQ (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"): scales without data that outliers move little."""

from __future__ import annotations

import torch

from bmgraph.passes.quantize.code_grid import SHIFTS, CodeGrid, bounded
from bmgraph.passes.quantize.mse import LEAST_SHARE

STEPS, NORM, BETA, GROWTH = 20, 0.7, 10.0, 1.01
"""Iterations; the power p of errors that are summed; the weight of the quadratic term at first, and how it grows (all of the paper)."""


def hqq_scales(values: torch.Tensor, widest: CodeGrid, least: int, most: int) -> CodeGrid:
    """The grid with the least sum of |error| ** NORM that half-quadratic steps reach from the widest.

    Each step takes errors, shrunk towards zero, out of the values (they stand for outliers) and fits what is left. The paper
    fits zero points, as floating numbers, at fixed scales. Kernels read whole ones, which such a step never leaves: so the scale
    is fitted, by least squares, and of codes with zero points from each of the SHIFTS. Errors are counted in steps of the
    widest scale.
    """
    unit = widest.scale.unsqueeze(-1)
    known, best, found = values / unit, torch.full_like(widest.scale, torch.inf), widest
    for shift in SHIFTS if widest.zero is not None else (0,):
        zero = None if widest.zero is None else (widest.zero + shift).clamp(least, most)
        share, error = _fitted(known, zero, least, most)
        found = CodeGrid(widest.scale * share, zero).where(error < best, found)
        best = torch.minimum(best, error)
    return found


def _fitted(
    known: torch.Tensor, zero: torch.Tensor | None, least: int, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scale f[...] of values f[..., n] at given zero points, and its sum of |error| ** NORM."""
    share = torch.ones_like(known[..., 0])
    best, found, beta = torch.full_like(share, torch.inf), share, BETA
    middle = None if zero is None else zero.unsqueeze(-1)
    for _ in range(STEPS):
        steps = share.unsqueeze(-1)
        codes = bounded(known / steps, middle, least, most)
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
    return found, best
