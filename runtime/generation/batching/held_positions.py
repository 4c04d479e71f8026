"""Some positions of one row of a KV cache, taken out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True)
class HeldPositions:
    """What the slots of a cache hold of positions of one row: `values` [1, ..., P, ...], with P at `axes`. None of it changes any more."""

    values: tuple[torch.Tensor, ...]
    axes: tuple[int, ...]

    def __len__(self) -> int:
        return int(self.values[0].shape[self.axes[0]])

    def part(self, begin: int, end: int) -> Self:
        """Those from `begin` to `end`, in the same memory."""
        parts = [value.narrow(axis, begin, end - begin) for value, axis in zip(self.values, self.axes)]
        return type(self)(tuple(parts), self.axes)

    def copied(self) -> Self:
        """The same in memory of their own, which holds nothing else."""
        return type(self)(
            tuple(value.clone(memory_format=torch.contiguous_format) for value in self.values), self.axes
        )


def joined(parts: Sequence[HeldPositions]) -> list[torch.Tensor]:
    """What each slot holds of all parts, one behind the other."""
    axes = parts[0].axes
    return [torch.cat([part.values[slot] for part in parts], axis) for slot, axis in enumerate(axes)]
