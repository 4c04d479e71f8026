"""Ranges that static scales of activations cover: all values that were seen, or fewer, so that the others have finer steps."""

from __future__ import annotations

from collections.abc import Callable

import torch

RangeRule = Callable[[torch.Tensor, float, float], tuple[float, float]]
"""(counts f64[BINS] of values in equal bins from low to high, low, high) -> the ends of the range that codes cover."""

BINS = 2048
"""Into how many bins values are counted."""

KEPT = 0.9999
"""The share of values that "percentile" keeps."""

LEVELS = 255
"""How many codes "entropy" spreads over a range."""

SHARES = tuple(1 - 0.02 * step for step in range(36))
"""The shares of the whole range that "entropy" tries, at both ends alike."""

LEAST = 1e-6
"""The probability that counts for none."""


def percentile(counts: torch.Tensor, low: float, high: float) -> tuple[float, float]:
    """The range without the (1 - KEPT) / 2 smallest and as many largest values (McKinstry et al. 2018, arXiv:1809.04191)."""
    dropped = (1 - KEPT) / 2 * float(counts.sum())
    width = (high - low) / len(counts)
    below = int((counts.cumsum(0) <= dropped).sum())
    above = int((counts.flip(0).cumsum(0) <= dropped).sum())
    return low + below * width, high - above * width


def entropy(counts: torch.Tensor, low: float, high: float) -> tuple[float, float]:
    """The range, among SHARES of the whole, whose codes tell most of how values are distributed.

    The least Kullback-Leibler divergence of the distribution of clipped values from that of the same values in LEVELS steps
    (Migacz 2017, "8-bit Inference with TensorRT").
    """
    best, found = float("inf"), 1.0
    width = (high - low) / len(counts)
    for share in SHARES:
        first, last = round((low * share - low) / width), round((high * share - low) / width)
        inside = counts[first:last]
        if len(inside) < LEVELS or not bool(inside.sum() > 0):
            break
        lost = _divergence(inside, float(counts[:first].sum()), float(counts[last:].sum()))
        if lost < best:
            best, found = lost, share
    return low * found, high * found


def _divergence(inside: torch.Tensor, below: float, above: float) -> float:
    """How far counts f64[n], with those beyond at the ends, are from themselves in LEVELS steps."""
    clipped = inside.clone()
    clipped[0] += below
    clipped[-1] += above
    level = torch.arange(len(inside)) * LEVELS // len(inside)
    sums, used = torch.zeros(LEVELS, dtype=inside.dtype), torch.zeros(LEVELS, dtype=inside.dtype)
    sums.index_add_(0, level, inside)
    used.index_add_(0, level, (inside > 0).to(inside.dtype))
    spread = torch.where(inside > 0, sums[level] / used[level].clamp(min=1), 0.0)
    true, seen = clipped / clipped.sum(), (spread / spread.sum()).clamp(min=LEAST)
    return float((true * (true.clamp(min=LEAST) / seen).log()).sum())


RANGES: dict[str, RangeRule | None] = {"max": None, "percentile": percentile, "entropy": entropy}
"""Name -> how a range is chosen; None: from the smallest to the largest value."""
