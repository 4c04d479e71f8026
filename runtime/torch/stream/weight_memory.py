"""The memory of weights: those that stay between runs, and buffers for those that are read and dropped."""

from __future__ import annotations

import mmap
import threading

import torch

from bmgraph.runtime.torch.stream.schedule import Schedule, Unit


class WeightMemory:
    """What the graphs of one engine share; `running` is held by the run that goes on, since the limit is that of all of them.

    Each buffer is mapped by itself, so that what is dropped is given back to the system at once.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running = threading.Lock()
        self.stays: dict[Unit, torch.Tensor] = {}
        self._idle: list[torch.Tensor] = []
        self._used = self._capacity = 0

    @property
    def mapped(self) -> int:
        """Bytes of memory that weights take now."""
        return self._used + sum(map(len, self._idle)) + sum(unit.room for unit in list(self.stays))

    def begin(self, schedule: Schedule) -> None:
        """Drop what does not stay by the schedule of the run that begins."""
        self.stays = {unit: held for unit, held in self.stays.items() if unit in schedule.stays}
        self._capacity = schedule.capacity

    def end(self) -> None:
        """Drop the buffers of the run that ended; what stays is kept."""
        self._idle.clear()
        self._used = 0

    def keep(self, unit: Unit) -> torch.Tensor:
        """Memory for a unit that stays, u8[bytes]; `stays` has it once it is filled."""
        return _mapped(unit.room)[: unit.bytes]

    def take(self, unit: Unit) -> torch.Tensor | None:
        """A buffer for a unit, u8[room]; None while there is no room for it."""
        used = self._used + unit.room
        if used > self._capacity:
            return None
        place = next((place for place, item in enumerate(self._idle) if len(item) == unit.room), None)
        if place is not None:
            buffer = self._idle.pop(place)
        else:
            while self._idle and used + sum(map(len, self._idle)) > self._capacity:
                self._idle.pop(0)
            buffer = _mapped(unit.room)
        self._used = used  # last, so that `mapped`, which other threads read, never counts a buffer twice
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        """Let a buffer be used again."""
        self._used -= len(buffer)
        self._idle.append(buffer)


def _mapped(size: int) -> torch.Tensor:
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, size, **private), dtype=torch.uint8)
