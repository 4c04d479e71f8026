"""The memory of weights: those that stay between runs, and room for those that are read and dropped."""

from __future__ import annotations

import threading

import torch

from bmgraph.runtime.torch.stream.place import HostPlace, Place, Room
from bmgraph.runtime.torch.stream.schedule import Schedule, Unit


class WeightMemory:
    """What the graphs of one engine share; `running` is held by the run that goes on, since the limit is that of all of them.

    The room for what is dropped is one block that is kept between runs: new memory costs the processor as much as a copy.
    """

    def __init__(self, limit: int, place: Place | None = None) -> None:
        self.limit = limit
        self.place = HostPlace() if place is None else place
        self.running = threading.Lock()
        self.stays: dict[Unit, torch.Tensor] = {}
        self._block = _Block(None)
        self._capacity = self._used = 0
        self._apart: dict[int, Room] = {}
        """Memory outside of the block, by its address: for uses that found no place in it, though there was room enough."""

    @property
    def mapped(self) -> int:
        """Bytes of memory that weights take now, at most."""
        apart = sum(len(room.bytes) for room in self._apart.values())
        if self.place.gives_back:
            reading = self._used if apart else max(self._used, self._block.size)
        else:
            reading = self._block.size + apart
        return reading + sum(unit.room for unit in list(self.stays))

    def begin(self, schedule: Schedule) -> None:
        """Drop what does not stay by the schedule of the run that begins, and of the room for others what it does not allow."""
        self.place.begin()
        self.stays = {unit: held for unit, held in self.stays.items() if unit in schedule.stays}
        self._capacity = schedule.capacity
        if self._block.size != schedule.block:
            self._block = _Block(None)  # before there is another one
            self._block = _Block(self.place.room(schedule.block) if schedule.block else None)

    def end(self) -> None:
        """Drop what the run that ended read; what stays is kept."""
        self.place.end()
        self._apart.clear()
        self._used = 0
        self._block.clear()

    def keep(self, unit: Unit) -> torch.Tensor:
        """Memory for a unit that stays, u8[bytes]; `stays` has it once it is filled."""
        made = self.place.room(unit.room).bytes[: unit.bytes]
        self.place.taken(made, new=True)
        return made

    def take(self, unit: Unit, now: bool) -> torch.Tensor | None:
        """Memory for a unit, u8[bytes]; None while there is no room for it.

        `now`: the run waits for it, so that nothing will be dropped before it is there. Where the room that is free is in parts that
        are too small, the unit gets memory of its own: they are given back to the system for it, or the schedule left so much apart.
        """
        if self._used + unit.room > self._capacity:
            return None
        found = self._block.take(unit.room)
        if found is None and not now:
            return None
        if found is None:
            self._block.give_back_free()
            room = self.place.room(unit.room)
            found = room.bytes
            self._apart[found.data_ptr()] = room
            self.place.taken(found, new=True)
        else:
            self.place.taken(found, new=False)
        self._used += unit.room
        return found[: unit.bytes]

    def give_back(self, buffer: torch.Tensor) -> None:
        """Let what `take` gave be used again."""
        apart = self._apart.pop(buffer.data_ptr(), None)
        if apart is None:
            size = self._block.drop(buffer)
            self.place.dropped(buffer)
        else:
            size = len(apart.bytes)
        if self._apart:
            self._block.give_back_free()
        self._used -= size


class _Block:
    """One block of memory, of which parts are taken and dropped; the first one that is large enough is taken."""

    def __init__(self, room: Room | None) -> None:
        self._room = room
        self._bytes = torch.empty(0, dtype=torch.uint8) if room is None else room.bytes
        self.size = len(self._bytes)
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
        """Give the memory of all that is free back to the system, where it takes it."""
        if self._room is not None:
            for low, high in self._free:
                self._room.give_back(low, high)
