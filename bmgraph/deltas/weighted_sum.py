"""Weighted sums of deltas of one linear, as PEFT's `add_weighted_adapter` computes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from bmgraph.deltas.family import Change
from bmgraph.errors import PassError

Combination = Literal["cat", "linear", "svd"]
"""How low-rank deltas are added up. cat: their factors side by side, exact, of the sum of their ranks; linear: their factors are
added up, which is an approximation, for equal ranks; svd: the best approximation of the exact sum of a given rank."""

Weighted = Sequence[tuple[float, Change]]
"""The changes of one linear, each with its weight."""

SCALE, A, B = "scale", "a", "b"


def sum_of_factors(changes: Weighted, how: Combination, rank: int | None, module: str) -> Change:
    """The sum of `weight * scale * B A` as one change of scale 1; `rank` is that of "svd".

    Raises PassError for "linear" where ranks differ.
    """
    if how == "linear":
        return _linear(changes, module)
    a = torch.cat([change.tensors[A].double() for _, change in changes])
    b = torch.cat(
        [change.tensors[B].double() * (weight * change.numbers[SCALE]) for weight, change in changes], 1
    )
    if how == "svd":
        a, b = _of_rank(a, b, rank or max(len(change.tensors[A]) for _, change in changes))
    dtype = changes[0][1].tensors[A].dtype
    return Change({A: a.to(dtype), B: b.to(dtype)}, {SCALE: 1.0})


def sum_of_tensors(changes: Weighted) -> Change:
    """The weighted sum of each tensor, of changes that have the same ones."""
    first = changes[0][1]
    tensors = {
        key: torch.stack([weight * change.tensors[key] for weight, change in changes]).sum(0)
        for key in first.tensors
    }
    return Change(tensors, first.numbers)


def _linear(changes: Weighted, module: str) -> Change:
    """Factors times the square roots of their weights and scales, added up; the sign of a weight goes to A."""
    ranks = {len(change.tensors[A]) for _, change in changes}
    if len(ranks) > 1:
        raise PassError(
            f"{module}: the deltas have the ranks {', '.join(map(str, sorted(ranks)))}, and combination='linear' adds factors of "
            "one rank: choose 'cat' or 'svd'"
        )
    factors = [weight * change.numbers[SCALE] for weight, change in changes]
    roots = [math.sqrt(abs(factor)) for factor in factors]
    pairs = list(zip(factors, roots, changes))
    a = sum(math.copysign(root, factor) * change.tensors[A] for factor, root, (_, change) in pairs)
    b = sum(root * change.tensors[B] for _, root, (_, change) in pairs)
    assert isinstance(a, torch.Tensor)
    assert isinstance(b, torch.Tensor)
    return Change({A: a, B: b}, {SCALE: 1.0})


def _of_rank(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors [rank, in] and [out, rank] of the best approximation of `b @ a`, without making that product."""
    left, right = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, sizes, v = torch.linalg.svd(left.R @ right.R.T)
    rank = min(rank, len(sizes))
    return v[:rank] @ right.Q.T, left.Q @ (u[:, :rank] * sizes[:rank])
