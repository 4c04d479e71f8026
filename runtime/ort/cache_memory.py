"""The memory of a KV cache on ONNX Runtime: slots that grow by a copy at every step, and slots with room that are appended in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from bmgraph.ir.cache_spec import CacheSpec, Slot
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.ort.session import import_onnxruntime

if TYPE_CHECKING:
    from onnxruntime import OrtValue

FIRST_ROOM = 256
"""For how many positions beyond the first step slots in place have room at first, if that many may come."""


class CacheMemory:
    """The slots of one batch, of `rows` rows of at most `most` positions, on `device` (the CPU for slots in place).

    `held` is the number of positions in them; `grows`: whether there are slots that are not in place.
    """

    def __init__(self, cache: CacheSpec, rows: int, device: str, most: int) -> None:
        self.held = self._room = 0
        self.rows, self._device, self._most = rows, device, most
        self._in_place = tuple(slot for slot in cache.slots if slot.in_place)
        self._growing = tuple(slot for slot in cache.slots if not slot.in_place)
        self._ort_value: Any = import_onnxruntime().OrtValue
        self.grows = bool(self._growing)
        self._arrays = {slot.past.name: _zeros(slot, rows) for slot in self._in_place}
        self._values: dict[str, OrtValue] = {
            slot.past.name: self._value(_zeros(slot, rows)) for slot in self._growing
        }

    def bind(self, binding: Any, new: int) -> None:
        """Bind all slots to a run that appends `new` positions; those in place stay bound until they get more room."""
        for slot in self._growing:
            binding.bind_ortvalue_input(slot.past.name, self._values[slot.past.name])
            binding.bind_output(slot.present.name, self._device)
        if self.make_room(new):
            self.bind_all(binding)

    def make_room(self, new: int) -> bool:
        """Count `new` positions as held; returns whether that took new memory for the slots in place."""
        before, self.held = self.held, self.held + new
        if self.held <= self._room or not self._in_place:
            return False
        wanted = max(2 * self._room, self.held + FIRST_ROOM)
        self._room = max(self.held, min(self._most, wanted))
        for slot in self._in_place:
            larger = _zeros(slot, self.rows, self._room)
            index = [slice(None)] * larger.ndim
            index[slot.axis] = slice(before)
            larger[tuple(index)] = self._arrays[slot.past.name][tuple(index)]
            self._arrays[slot.past.name] = larger
            self._values[slot.past.name] = self._value(larger)
        return True

    def bind_all(self, binding: Any) -> None:
        """Bind the slots in place, whole."""
        for slot in self._in_place:
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
            held = self._arrays[slot.past.name][tuple(index)]
            held[:] = held[rows]
        for slot in self._growing:
            self._values[slot.past.name] = self._value(self._values[slot.past.name].numpy()[rows])

    def keep(self, presents: Sequence[OrtValue]) -> None:
        """Keep what a run returned behind the logits for the next one."""
        self._values |= {slot.past.name: present for slot, present in zip(self._growing, presents)}

    def _value(self, array: Array) -> OrtValue:
        return self._ort_value.ortvalue_from_numpy(array, self._device)  # type: ignore[no-any-return]


def _zeros(slot: Slot, rows: int, room: int = 0) -> Array:
    found: Array = torch.zeros(
        slot.empty_shape(rows, room), dtype=slot.past.dtype
    ).numpy()  # aligned to 64 bytes
    return found
