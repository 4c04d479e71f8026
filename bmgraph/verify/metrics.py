"""Metrics of the distance between outputs: relative error, cosine, KL divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

PART = 1 << 20
"""The number of elements that are compared at once."""


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected|| (L2), or ||found|| if expected is zero.

    Equal infinities and pairs of NaN count as equal; other non-finite differences, and different shapes, give infinity.
    """
    if found.shape != expected.shape or found.is_complex() != expected.is_complex():
        return float("inf")
    norms = _norms(found, expected)
    if norms is not None:
        difference, scale = norms
        return difference / scale if scale > 0 else difference
    sums = [_squares(*part) for part in zip(_parts(found), _parts(expected))]
    difference, scale = (float(torch.stack(terms).sum().sqrt()) for terms in zip(*sums))
    if not math.isfinite(difference):
        return float("inf")
    return difference / scale if scale > 0 else difference


def _norms(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float] | None:
    """The norms of the difference and of the expected values, of float32 that is finite; None for others, which take many
    times as long: NaN and infinities are compared one by one, and other types in double."""
    if not found.dtype == expected.dtype == torch.float32:
        return None
    pairs = [
        (
            torch.linalg.vector_norm(mine - theirs, dtype=torch.float64),
            torch.linalg.vector_norm(theirs, dtype=torch.float64),
        )
        for mine, theirs in zip(_parts(found), _parts(expected))
    ]
    difference, scale = (float(torch.linalg.vector_norm(torch.stack(norms))) for norms in zip(*pairs))
    return (difference, scale) if math.isfinite(difference) and math.isfinite(scale) else None


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The elements of a tensor in parts of PART: copies in double of all logits of a batch would take gigabytes.

    Complex values count as their real and imaginary parts.
    """
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return torch.split(real.detach().reshape(-1), PART)


def _squares(found: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of squares of the difference and of the expected values."""
    mine, theirs = found.double(), expected.double()
    same = (mine == theirs) | (mine.isnan() & theirs.isnan())
    difference = torch.where(same, 0.0, mine - theirs).square().sum()
    return difference, torch.where(theirs.isfinite(), theirs, 0.0).square().sum()


@dataclass(frozen=True)
class Drift:
    """Distance between two sets of outputs: the largest relative error, the output that has it, and its mean cosine."""

    error: float
    cosine: float
    output: str
    divergence: float | None = None
    """Mean KL divergence KL(expected, found) of the softmax over the last axis; None if that has fewer than 2 entries."""

    def __str__(self) -> str:
        return f"{self.error:.2e} (cosine {self.cosine:.5f}, {self.output})"


def drift(
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    mask: torch.Tensor | None = None,
    padded: Collection[str] = (),
) -> Drift:
    """The drift between outputs of the same names.

    In the outputs `padded` [batch, sequence, ...], positions where `mask` [batch, sequence] is 0 are ignored.
    Outputs that are not floating-point must be equal: else their error is infinite.
    """
    worst = Drift(0.0, 1.0, "")
    for name, error in errors(found, expected, mask, padded).items():
        if not expected[name].is_floating_point():
            if error > worst.error:
                worst = Drift(error, worst.cosine, name)
        elif error >= worst.error:
            mine, theirs = without_padding(name, found[name], expected[name], mask, padded)
            worst = Drift(error, _cosine(mine, theirs), name, _divergence(mine, theirs))
    return worst


def errors(
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    mask: torch.Tensor | None = None,
    padded: Collection[str] = (),
) -> dict[str, float]:
    """The relative error of each output, as in `drift`."""
    measured = {}
    for name, theirs in expected.items():
        if theirs.is_floating_point():
            measured[name] = relative_error(*without_padding(name, found[name], theirs, mask, padded))
        else:
            measured[name] = 0.0 if torch.equal(found[name].to(theirs.device), theirs) else float("inf")
    return measured


def without_padding(
    name: str, mine: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor | None, padded: Collection[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two values of the output `name` without the positions of padding, as in `drift`; both where the second one is."""
    mine = mine.to(theirs.device)
    if mask is not None and name in padded and mine.shape == theirs.shape:
        kept = mask.to(theirs.device).bool()
        return mine[kept], theirs[kept]
    return mine, theirs


def _cosine(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    if mine.shape != theirs.shape or mine.dim() == 0:
        return 0.0 if mine.shape != theirs.shape else 1.0
    return _mean_of_rows(torch.nn.functional.cosine_similarity, mine, theirs)


def _divergence(mine: torch.Tensor, theirs: torch.Tensor) -> float | None:
    if mine.shape != theirs.shape or mine.dim() < 2 or mine.shape[-1] < 2:
        return None
    return _mean_of_rows(_row_divergences, mine, theirs)


def _row_divergences(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    log_mine, log_theirs = torch.log_softmax(mine, -1), torch.log_softmax(theirs, -1)
    return (log_theirs.exp() * (log_theirs - log_mine)).sum(-1)


def _mean_of_rows(
    measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], mine: torch.Tensor, theirs: torch.Tensor
) -> float:
    """The mean of what is measured along the last axis, in double, about PART elements at a time."""
    if not mine.numel():
        return float("nan")
    rows = max(1, PART // mine.shape[-1])
    pairs = zip(*(torch.split(item.reshape(-1, item.shape[-1]), rows) for item in (mine, theirs)))
    return float(torch.cat([measure(one.double(), other.double()) for one, other in pairs]).mean())
