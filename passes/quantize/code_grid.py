"""The values that codes stand for: whole steps of a scale around a zero point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

SHIFTS = (0, -1, 1)
"""How far the zero points that a search tries lie from the one that covers all values."""


class CodeGrid(NamedTuple):
    """Scales f[...] of the values f[..., n] that share them, and zero points f[...], codes as whole numbers; None where all are 0.

    A code from `least` to `most` stands for (code - zero) * scale.
    """

    scale: torch.Tensor
    zero: torch.Tensor | None = None

    @classmethod
    def covering(cls, values: torch.Tensor, least: int, most: int) -> CodeGrid:
        """The finest grid that reaches all values f[..., n], and 0: what is filled up with zeros has codes then."""
        low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
        scale = (high - low) / (most - least)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return cls(scale, torch.round(least - low / scale).clamp(least, most))

    def turned(self) -> CodeGrid:
        """With its two axes in the other order."""
        return CodeGrid(self.scale.T, None if self.zero is None else self.zero.T)

    def typed(self, dtype: torch.dtype) -> CodeGrid:
        """With scales rounded to a type."""
        return self._replace(scale=self.scale.to(dtype))

    def of(self, rows: slice) -> CodeGrid:
        """Those of some rows."""
        return CodeGrid(self.scale[rows], None if self.zero is None else self.zero[rows])

    def set(self, rows: slice, other: CodeGrid) -> None:
        """Write those of some rows."""
        self.scale[rows] = other.scale
        if self.zero is not None:
            assert other.zero is not None
            self.zero[rows] = other.zero

    def smaller(self, shares: Sequence[float], least: int, most: int) -> Iterator[CodeGrid]:
        """Grids of smaller steps, and, where there are zero points, of ones beside them: together these leave out values at either end."""
        for shift in SHIFTS if self.zero is not None else (0,):
            zero = None if self.zero is None else (self.zero + shift).clamp(least, most)
            for share in shares:
                yield CodeGrid(self.scale * share, zero)

    def where(self, chosen: torch.Tensor, other: CodeGrid) -> CodeGrid:
        """Its own scales and zero points where `chosen` bool[...], those of another elsewhere."""
        zero = None if self.zero is None or other.zero is None else torch.where(chosen, self.zero, other.zero)
        return CodeGrid(torch.where(chosen, self.scale, other.scale), zero)


class Encoded(NamedTuple):
    """A weight as it is stored: codes, scales and, where the format has them, zero points."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None


def bounded(steps: torch.Tensor, zero: torch.Tensor | None, least: int, most: int) -> torch.Tensor:
    """Whole steps f[...] from 0 such that their codes, these and zero points of the same shape, are from `least` to `most`."""
    if zero is None:
        return torch.clamp(torch.round(steps), least, most)
    return torch.clamp(torch.round(steps), least - zero, most - zero)


def rounded(values: torch.Tensor, grid: CodeGrid, least: int, most: int) -> torch.Tensor:
    """Values f[..., n] at their nearest codes, on grids of [...]."""
    scale = grid.scale.unsqueeze(-1)
    zero = None if grid.zero is None else grid.zero.unsqueeze(-1)
    return bounded(values / scale, zero, least, most).mul_(scale)
