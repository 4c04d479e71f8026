"""What an encoder gave for rows that decode together: each row's outputs as long as the longest, with padding behind.

Nothing is assumed of how a program marks padding: each prompt is encoded with a position of padding behind it, and what the encoder gave
there stands for all further ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch

from bmgraph.ir.tensor_spec import TensorSpec

PADDED = 1
"""How many positions of padding a prompt is encoded with at least, where the encoder has room for them."""


def position_axis(spec: TensorSpec) -> int | None:
    """The axis of a memory, beside that of rows, that is as long as the prompt; None where it has a fixed size."""
    return next((axis for axis, dim in enumerate(spec.shape) if axis and isinstance(dim, str)), None)


def unfit_memory(spec: TensorSpec, rows: object) -> str:
    """Why a memory of rows, whose number is `rows`, cannot be put together with others; empty if it can."""
    if not spec.shape or spec.shape[0] != rows:
        return f"its encoder gives {spec}, which has no rows"
    if sum(isinstance(dim, str) for dim in spec.shape) > 2:
        return f"its encoder gives {spec}, which has more than one size of its own"
    return ""


class RowMemories:
    """Memories of rows [B, ...] by name, `values`, of L positions where they have any; other rows join, and some leave.

    Each row was encoded with padding behind, or is as long as any may be.
    """

    def __init__(self, specs: Sequence[TensorSpec], values: Mapping[str, torch.Tensor]) -> None:
        self._axes = {spec.name: position_axis(spec) for spec in specs}
        self._memory = {name: values[name] for name in self._axes}
        self._rows = len(next(iter(self._memory.values())))
        self._row_room = self._rows
        self._lengths = [self._length] * self._rows

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """The memories of the rows that are there, contiguous."""
        return {name: value[: self._rows] for name, value in self._memory.items()}

    def reserve(self, rows: int) -> None:
        """Have room for `rows` rows, when the next one joins."""
        self._row_room = max(rows, self._rows)

    def join(self, other: Self) -> None:
        """Take the rows of another one behind those that are there; whichever are shorter are padded."""
        rows = self._rows + other._rows
        longest = {name: max(self._size(name), other._size(name)) for name in self._axes}
        for name, axis in self._axes.items():
            if rows > len(self._memory[name]) or longest[name] > self._size(name):
                self._move(name, max(rows, self._row_room), longest[name])
            _put(self._memory[name][self._rows : rows], other._memory[name][: other._rows], axis)
        self._lengths += other._lengths
        self._rows = rows

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Let only these rows go on, in this order; memory that was for longer ones alone is given back."""
        moved = [(place, row) for place, row in enumerate(rows) if place != row]
        if moved:
            places, sources = map(list, zip(*moved))
            for value in self._memory.values():
                value[places] = value[sources]
        self._rows, self._lengths = len(rows), [self._lengths[row] for row in rows]
        too_long = self._length - max(self._lengths)
        if 2 * too_long > self._length:
            for name, axis in self._axes.items():
                if axis is not None:
                    kept = self._memory[name].narrow(axis, 0, self._size(name) - too_long)
                    self._memory[name] = kept.clone(memory_format=torch.contiguous_format)

    @property
    def _length(self) -> int:
        return max(map(self._size, self._axes))

    def _size(self, name: str) -> int:
        axis = self._axes[name]
        return 0 if axis is None else int(self._memory[name].shape[axis])

    def _move(self, name: str, rows: int, length: int) -> None:
        """Have memory for so many rows and positions, with the rows that are there."""
        held, axis = self._memory[name][: self._rows], self._axes[name]
        sizes = [rows, *held.shape[1:]]
        if axis is not None:
            sizes[axis] = length
        self._memory[name] = held.new_empty(sizes)
        _put(self._memory[name][: self._rows], held, axis)


def _put(room: torch.Tensor, values: torch.Tensor, axis: int | None) -> None:
    """Write values where there may be room for more positions; behind them their last one, which is padding, is repeated."""
    if axis is None:
        room.copy_(values)
        return
    held, whole = values.shape[axis], room.shape[axis]
    room.narrow(axis, 0, held).copy_(values)
    if whole > held:
        room.narrow(axis, held, whole - held).copy_(values.narrow(axis, held - 1, 1))
