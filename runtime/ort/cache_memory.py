"""The memory of a KV cache on ONNX Runtime: slots that grow by a copy at every step, and slots with room that are appended in place."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bmgraph.ir.cache_spec import CacheSpec, Slot
from bmgraph.runtime.generation.batching.held_positions import HeldPositions, joined
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.ort.session import import_onnxruntime
from bmgraph.utils.huge_pages import mapped

if TYPE_CHECKING:
    from onnxruntime import OrtValue

FIRST_ROOM = 256
"""For how many positions beyond the first step slots in place have room at first, if that many may come."""

MAPPED = 1 << 22
"""Slots in place of so many bytes or more are mapped: `calloc` fills what it gives again of memory that was freed."""

ALIGNED = 64
"""Where the memory of slots in place begins is a multiple of so many bytes."""

Place = tuple[int, int]
"""Where slots in place are: how often they moved, and how many rows they hold."""

NOWHERE: Place = (0, 0)


class CacheMemory:
    """The slots of one batch, of `rows` rows of at most `most` positions, on `device` (the CPU for slots in place).

    `held` is the number of positions in them; `grows`: whether there are slots that are not in place. Slots in place may have room
    for more rows than there are (`reserve`); the rows are then the first ones of an array.
    """

    def __init__(self, cache: CacheSpec, rows: int, device: str, most: int) -> None:
        self.held = self._room = 0
        self.rows, self._device, self._most = rows, device, most
        self._row_room, self._moved = rows, 1
        self._in_place = tuple(slot for slot in cache.slots if slot.in_place)
        self._growing = tuple(slot for slot in cache.slots if not slot.in_place)
        self._ort_value: Any = import_onnxruntime().OrtValue
        self.grows = bool(self._growing)
        self._arrays = {slot.past.name: _zeros(slot, rows) for slot in self._in_place}
        self._values: dict[str, OrtValue] = {
            slot.past.name: self._value(_zeros(slot, rows)) for slot in self._growing
        }

    def bind(self, binding: Any, new: int, place: Place) -> Place:
        """Bind all slots to a run that appends `new` positions; those in place stay bound until they move, or hold more or fewer rows.
        `place` is what the last call for this binding gave, NOWHERE before the first; several bindings may take turns. Returns where the
        slots in place are now."""
        for slot in self._growing:
            binding.bind_ortvalue_input(slot.past.name, self._values[slot.past.name])
            binding.bind_output(slot.present.name, self._device)
        self.make_room(new)
        now = self._moved, self.rows
        if place != now:
            self._bind_all(binding)
        return now

    def make_room(self, new: int) -> bool:
        """Count `new` positions as held; returns whether that took new memory for the slots in place."""
        before, self.held = self.held, self.held + new
        if self.held <= self._room or not self._in_place:
            return False
        self._room = max(self.held, min(self._most, self._grown(self.held)))
        self._allocate(before)
        return True

    def _bind_all(self, binding: Any) -> None:
        """Bind the slots in place, all rows that there are."""
        for slot in self._in_place:
            self._values[slot.past.name] = self._value(self._arrays[slot.past.name][: self.rows])
            binding.bind_ortvalue_input(slot.past.name, self._values[slot.past.name])
            binding.bind_ortvalue_output(slot.present.name, self._values[slot.past.name])

    def bind_rows(self, binding: Any, part: slice) -> list[OrtValue]:
        """Bind some rows of the slots in place; returns what the caller keeps until the run is over."""
        views = []
        for slot in self._in_place:
            view = self._value(self._arrays[slot.past.name][part])
            binding.bind_ortvalue_input(slot.past.name, view)
            binding.bind_ortvalue_output(slot.present.name, view)
            views.append(view)
        return views

    def forget(self, count: int) -> None:
        """Take the last `count` positions from all slots: those in place keep what is there until it is overwritten."""
        self.held -= count
        for slot in self._growing:
            index = [slice(None)] * len(slot.past.shape)
            index[slot.axis] = slice(self.held)
            whole: Array = self._values[slot.past.name].numpy()
            self._values[slot.past.name] = self._value(whole[tuple(index)].copy())

    def reorder(self, rows: Array) -> None:
        """Let each row hold what another one holds: row i what rows[i] does, i64[B]."""
        if (rows == range(self.rows)).all():
            return
        for slot in self._in_place:
            index = [slice(None)] * len(slot.past.shape)
            index[slot.axis] = slice(self.held)
            held = self._arrays[slot.past.name][: self.rows][tuple(index)]
            held[:] = held[rows]
        for slot in self._growing:
            self._values[slot.past.name] = self._value(self._values[slot.past.name].numpy()[rows])

    def repeat_rows(self, each: int) -> None:
        """Let each row be followed by `each` - 1 others that hold what it holds."""
        rows = np.arange(self.rows).repeat(each)
        if len(rows) > self._row_room:
            self.reserve(len(rows), self._most)
        for slot in self._in_place:
            held = self._arrays[slot.past.name][_along(slot, slice(self.held))]
            held[: len(rows)] = held[rows]
        for slot in self._growing:
            self._values[slot.past.name] = self._value(self._values[slot.past.name].numpy()[rows])
        self.rows = len(rows)

    def reserve(self, rows: int, most: int) -> None:
        """Have room for `rows` rows of `most` positions at most, not fewer than there are; memory that no position was written to is not
        taken yet."""
        self._most = max(most, self.held)
        # grown now, while few rows are there: later all of them would be copied
        room = min(self._most, max(self._room, self._grown(self.held)))
        if (rows, room) == (self._row_room, self._room):
            return
        self._row_room, self._room = max(rows, self.rows), room
        self._allocate(self.held)

    def join(self, other: CacheMemory) -> None:
        """Take the rows of another one behind those that are there: the last positions of all stand at one place, and what is missing in
        front is zero."""
        if other.held > self.held:
            self._put_in_front(other.held - self.held)
        rows, front = self.rows + other.rows, self.held - other.held
        if rows > self._row_room:
            self.reserve(rows, self._most)
        for slot in self._in_place:
            room = self._arrays[slot.past.name][self.rows : rows]
            room[_along(slot, slice(front))] = 0  # what another row left there may be no number
            room[_along(slot, slice(front, self.held))] = other._arrays[slot.past.name][: other.rows][
                _along(slot, slice(other.held))
            ]
        for slot in self._growing:
            own, new = (memory._values[slot.past.name].numpy() for memory in (self, other))
            self._values[slot.past.name] = self._value(np.concatenate([own, _behind(slot, front, new)]))
        self.rows = rows

    def join_apart(self, other: CacheMemory) -> None:
        """Take the rows of another one, whose slots are all in place, behind those that are there: the first positions of all stand at
        one place, and nobody reads what is behind a shorter row."""
        assert not self._growing
        if other.held > self.held:
            self.make_room(other.held - self.held)
        rows = self.rows + other.rows
        if rows > self._row_room:
            self.reserve(rows, self._most)
        for slot in self._in_place:
            index = _along(slot, slice(other.held))
            self._arrays[slot.past.name][self.rows : rows][index] = other._arrays[slot.past.name][
                : other.rows
            ][index]
        self.rows = rows

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Let only these rows go on, in this order."""
        moved = [(place, row) for place, row in enumerate(rows) if place != row]
        if moved:
            places, sources = map(list, zip(*moved))
            for slot in self._in_place:
                held = self._arrays[slot.past.name][_along(slot, slice(self.held))]
                held[places] = held[sources]
        for slot in self._growing:
            self._values[slot.past.name] = self._value(self._values[slot.past.name].numpy()[list(rows)])
        self.rows = len(rows)

    def forget_front(self, count: int) -> None:
        """Take the first `count` positions from all rows; the others move to the front."""
        before, self.held = self.held, self.held - count
        for slot in self._in_place:
            rows = self._arrays[slot.past.name][: self.rows]
            rows[_along(slot, slice(self.held))] = rows[_along(slot, slice(count, before))]
        for slot in self._growing:
            whole: Array = self._values[slot.past.name].numpy()
            self._values[slot.past.name] = self._value(whole[_along(slot, slice(count, before))].copy())

    def positions(self, row: int, begin: int, end: int) -> HeldPositions:
        """A copy of some positions of a row."""
        values = []
        for slot in (*self._in_place, *self._growing):
            name = slot.past.name
            whole = self._arrays[name] if slot.in_place else self._values[name].numpy()
            values.append(torch.from_numpy(whole[row : row + 1][_along(slot, slice(begin, end))].copy()))
        return HeldPositions(tuple(values), tuple(slot.axis for slot in (*self._in_place, *self._growing)))

    def begin_with(self, parts: Sequence[HeldPositions]) -> None:
        """Let the slots of one row, which hold nothing, hold these positions."""
        count = sum(map(len, parts))
        self.make_room(count)
        begin = 0
        for part in parts:
            for slot, value in zip(self._in_place, part.values):
                self._arrays[slot.past.name][_along(slot, slice(begin, begin + len(part)))] = value.numpy()
            begin += len(part)
        if self._growing:
            for slot, whole in zip(self._growing, joined(parts)[len(self._in_place) :]):
                self._values[slot.past.name] = self._value(whole.numpy())

    def keep(self, presents: Sequence[OrtValue]) -> None:
        """Keep what a run returned behind the logits for the next one."""
        self._values |= {slot.past.name: present for slot, present in zip(self._growing, presents)}

    def _put_in_front(self, count: int) -> None:
        """Let `count` positions that hold zeros stand before those of all rows."""
        before = self.held
        self.make_room(count)
        for slot in self._in_place:
            rows = self._arrays[slot.past.name][: self.rows]
            rows[_along(slot, slice(count, self.held))] = rows[_along(slot, slice(before))]
            rows[_along(slot, slice(count))] = 0
        for slot in self._growing:
            self._values[slot.past.name] = self._value(
                _behind(slot, count, self._values[slot.past.name].numpy())
            )

    def _grown(self, held: int) -> int:
        """For how many positions there is room after `held` outgrew it."""
        return max(2 * self._room, held + FIRST_ROOM)

    def _allocate(self, held: int) -> None:
        """Memory of the sizes that are wanted for the slots in place, with the `held` positions of the rows."""
        for slot in self._in_place:
            found = _zeros(slot, self._row_room, self._room)
            kept = self._arrays[slot.past.name][: self.rows][_along(slot, slice(held))]
            found[: self.rows][_along(slot, slice(held))] = kept
            self._arrays[slot.past.name] = found
        self._moved += 1

    def _value(self, array: Array) -> OrtValue:
        return self._ort_value.ortvalue_from_numpy(array, self._device)  # type: ignore[no-any-return]


def _along(slot: Slot, positions: slice) -> tuple[slice, ...]:
    """The index of some positions of all rows of a slot."""
    return (*[slice(None)] * slot.axis, positions)


def _behind(slot: Slot, count: int, values: Array) -> Array:
    """What a slot holds, behind `count` positions of zeros."""
    front = [(count, 0) if axis == slot.axis else (0, 0) for axis in range(values.ndim)]
    return np.pad(values, front)


def _zeros(slot: Slot, rows: int, room: int = 0) -> Array:
    """A slot without positions. What nobody writes to takes no memory: the system gives its zeros when they are first read."""
    shape = slot.empty_shape(rows, room)
    dtype = torch.empty(0, dtype=slot.past.dtype).numpy().dtype
    size = prod(shape) * dtype.itemsize
    memory = np.frombuffer(mapped(size), np.uint8) if size >= MAPPED else np.zeros(size + ALIGNED, np.uint8)
    begin = -memory.ctypes.data % ALIGNED
    found: Array = memory[begin : begin + size].view(dtype).reshape(shape)
    return found
