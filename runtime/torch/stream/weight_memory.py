"""The memory of weights: those that stay between runs, and room for those that are read and dropped."""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch

from bmgraph.runtime.torch.stream.schedule import Schedule, Unit
from bmgraph.serialize.opened import PART_PAGES

THREADS = 4
"""How many reads are asked of the disk at a time."""

PAGES = THREADS * PART_PAGES
"""Bytes that the threads read through."""


class WeightMemory:
    """What the graphs of one engine share; `running` is held by the run that goes on, since the limit is that of all of them.

    The room for what is dropped is one block that is kept between runs: new memory costs the processor as much as a copy.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running = threading.Lock()
        self.stays: dict[Unit, torch.Tensor] = {}
        self._block = _Block(0)
        self._capacity = self._used = 0
        self._apart: dict[int, torch.Tensor] = {}
        """Buffers outside of the block, by their address: for uses that found no place in it, though there was room enough."""
        self._pages: list[mmap.mmap] = []

    @property
    def mapped(self) -> int:
        """Bytes of memory that weights take now, at most."""
        reading = self._used if self._apart else max(self._used, self._block.size)
        return reading + sum(unit.room for unit in list(self.stays))

    def begin(self, schedule: Schedule) -> None:
        """Drop what does not stay by the schedule of the run that begins, and of the room for others what it does not allow."""
        self.stays = {unit: held for unit, held in self.stays.items() if unit in schedule.stays}
        self._capacity = schedule.capacity
        if self._block.size != schedule.reading:
            self._block = _Block(0)  # before there is another one
            self._block = _Block(schedule.reading)

    def end(self) -> None:
        """Drop what the run that ended read; what stays is kept."""
        self._apart.clear()
        self._used = 0
        self._block.clear()

    def pages(self) -> list[memoryview]:
        """Memory for each thread that reads, at the beginning of a page."""
        while len(self._pages) < THREADS:
            self._pages.append(_mapped(PART_PAGES))
        return [memoryview(item) for item in self._pages]

    def keep(self, unit: Unit) -> torch.Tensor:
        """Memory for a unit that stays, u8[bytes]; `stays` has it once it is filled."""
        return torch.frombuffer(_mapped(unit.room), dtype=torch.uint8)[: unit.bytes]

    def take(self, unit: Unit, now: bool) -> torch.Tensor | None:
        """Memory for a unit, u8[bytes]; None while there is no room for it.

        `now`: the run waits for it, so that nothing will be dropped before it is there. Where the room that is free is in parts that
        are too small, they are given back to the system, and the unit gets memory of its own.
        """
        if self._used + unit.room > self._capacity:
            return None
        found = self._block.take(unit.room)
        if found is None and now:
            self._block.give_back_free()
            found = torch.frombuffer(_mapped(unit.room), dtype=torch.uint8)
            self._apart[found.data_ptr()] = found
        if found is None:
            return None
        self._used += unit.room
        return found[: unit.bytes]

    def give_back(self, buffer: torch.Tensor) -> None:
        """Let what `take` gave be used again."""
        apart = self._apart.pop(buffer.data_ptr(), None)
        size = self._block.drop(buffer) if apart is None else len(apart)
        if self._apart:
            self._block.give_back_free()
        self._used -= size


class _Block:
    """One block of memory, of which parts are taken and dropped; the first one that is large enough is taken."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory = _mapped(size) if size else None
        self._bytes = torch.empty(0, dtype=torch.uint8)
        if self._memory is not None:
            self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._free: list[tuple[int, int]] = []
        self._taken: dict[int, int] = {}
        self.clear()

    def clear(self) -> None:
        """Drop all."""
        self._free, self._taken = ([(0, self.size)] if self.size else []), {}

    def take(self, size: int) -> torch.Tensor | None:
        """A part, u8[size]; None if there is none that is large enough."""
        for place, (begin, end) in enumerate(self._free):
            if end - begin >= size:
                self._free[place : place + 1] = [(begin + size, end)] if end - begin > size else []
                self._taken[begin] = size
                return self._bytes[begin : begin + size]
        return None

    def drop(self, part: torch.Tensor) -> int:
        """Let a part be taken again; returns its size."""
        begin = part.data_ptr() - self._bytes.data_ptr()
        size = self._taken.pop(begin)
        joined: list[tuple[int, int]] = []
        for low, high in sorted([*self._free, (begin, begin + size)]):
            if joined and joined[-1][1] == low:
                joined[-1] = joined[-1][0], high
            else:
                joined.append((low, high))
        self._free = joined
        return size

    def give_back_free(self) -> None:
        """Give the memory of all that is free back to the system, where it takes it; it gives it again when it is written to."""
        if self._memory is not None and hasattr(self._memory, "madvise"):
            for low, high in self._free:
                self._memory.madvise(mmap.MADV_DONTNEED, low, high - low)


def _mapped(size: int) -> mmap.mmap:
    """Memory that this process alone sees, in huge pages where the system has them."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # this system has none
            made.madvise(mmap.MADV_HUGEPAGE)
    return made
