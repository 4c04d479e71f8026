"""Reads the weights of one run in the order of their use, on threads of its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from bmgraph.runtime.torch.stream.place import Landing
from bmgraph.runtime.torch.stream.schedule import Schedule, Unit, Use
from bmgraph.runtime.torch.stream.weight_memory import WeightMemory
from bmgraph.utils.stored_tensor import Source

AHEAD = 64 * 2**20
"""Bytes that the system is told of before they are read, so that it has several reads to do at a time."""


@dataclass(frozen=True)
class _Piece:
    """A part of a use that one thread reads: `into` is its place in the memory of the use."""

    use: Use
    into: torch.Tensor
    begin: int


class Reader:
    """Within it threads read, as far ahead as the schedule's capacity allows; they have ended on exit, whatever happened.

    Uses are read in their order, in pieces, of which several are asked of the disk at a time. `take` waits for the next use, and raises
    what reading raised (BundleError for a file that was cut or changed).
    """

    def __init__(self, schedule: Schedule, memory: WeightMemory, sources: Mapping[str, Source]) -> None:
        self._schedule, self._memory, self._sources = schedule, memory, sources
        self._changed = threading.Condition()
        self._loaded: dict[Use, torch.Tensor] = {}
        self._coming: dict[Use, Any] = {}
        """For uses that were filled in this run: what the first call that reads them waits for."""
        self._filling: dict[Use, tuple[torch.Tensor, int]] = {}
        """Uses that are read: their memory, and the number of pieces that are left."""
        self._following: dict[Unit, list[Use]] = {}
        """For each unit that stays and is being read: later uses of it."""
        self._wanted: Use | None = None
        self._next = 0
        self._pieces: deque[_Piece] = deque()
        told = {name for name, source in sources.items() if memory.place.told(source)}
        self._to_tell = deque(
            use.unit for use in schedule.reads if use.unit not in schedule.stays and use.unit.name in told
        )
        """What the system is told of later on."""
        self._told = 0
        self._error: BaseException | None = None
        self._stopped = False
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Reader:
        self._memory.begin(self._schedule)
        if any(use.unit not in self._memory.stays for use in self._schedule.reads):
            self._threads = [
                threading.Thread(target=self._read_all, args=(landing,), name="bmgraph-stream")
                for landing in self._memory.place.landings()
            ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._loaded.clear()
        self._coming.clear()
        self._filling.clear()
        self._pieces.clear()
        self._memory.end()

    def take(self, use: Use) -> torch.Tensor:
        """The bytes of a use, u8[n], until `drop`."""
        with self._changed:
            if not self._threads:
                return self._memory.stays[use.unit]
            while use not in self._loaded:
                if self._error is not None:
                    raise self._error
                if self._wanted is None:
                    self._wanted = use
                    self._changed.notify_all()
                self._changed.wait()
            self._wanted = None
            self._memory.place.arrived(self._coming.pop(use, None))
            return self._loaded[use]

    def drop(self, use: Use) -> None:
        """Let the memory of a use be used again, unless it stays."""
        with self._changed:
            held = self._loaded.pop(use, None)
            if held is not None and use.unit not in self._schedule.stays:
                self._memory.give_back(held)
                self._changed.notify_all()

    def _read_all(self, landing: Landing) -> None:
        """What each thread does."""
        try:
            while (piece := self._piece()) is not None:
                landing.fill(self._sources[piece.use.unit.name], piece.into, piece.begin)
                self._read(piece.use)
        except BaseException as error:  # raised where the values are asked for
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _piece(self) -> _Piece | None:
        """The next piece to read, as soon as there is memory for its use; None if there is none, or the run has ended."""
        with self._changed:
            while not self._stopped and self._error is None:
                if self._pieces:
                    return self._pieces.popleft()
                if self._next == len(self._schedule.reads):
                    return None
                if self._begin(self._schedule.reads[self._next]):
                    self._next += 1
                else:
                    self._changed.wait()
        return None

    def _begin(self, use: Use) -> bool:
        """Cut a use into pieces, or find that it is in memory; whether there was room for it."""
        unit = use.unit
        stays = unit in self._schedule.stays
        if unit in self._memory.stays:
            self._loaded[use] = self._memory.stays[unit]
            self._changed.notify_all()
            return True
        if unit in self._following:
            self._following[unit].append(use)
            return True
        waits = self._wanted is not None and self._wanted not in self._filling
        into = self._memory.keep(unit) if stays else self._memory.take(unit, waits)
        if into is None:
            return False
        if stays:
            self._following[unit] = []
        elif self._memory.place.told(self._sources[unit.name]):
            self._tell(unit)
        self._pieces.extend(self._cut(use, into))
        self._filling[use] = into, len(self._pieces)
        return True

    def _read(self, use: Use) -> None:
        """A piece of a use has been read."""
        with self._changed:
            into, left = self._filling.pop(use)
            if left > 1:
                self._filling[use] = into, left - 1
                return
            self._loaded[use], self._coming[use] = into, self._memory.place.filled()
            if use.unit in self._schedule.stays:
                self._memory.stays[use.unit] = into
                for other in self._following.pop(use.unit):
                    self._loaded[other], self._coming[other] = into, self._coming[use]
            self._changed.notify_all()

    def _cut(self, use: Use, into: torch.Tensor) -> Iterator[_Piece]:
        """The pieces of a use: they meet where multiples of their size stand in the file."""
        source, unit = self._sources[use.unit.name], use.unit
        begin, piece = _begin_of(unit), self._memory.place.piece
        if source.read_whole:
            yield _Piece(use, into, begin)
            return
        place = 0
        while place < unit.bytes:
            size = min(piece - (source.offset + begin + place) % piece, unit.bytes - place)
            yield _Piece(use, into[place : place + size], begin + place)
            place += size

    def _tell(self, unit: Unit) -> None:
        """Tell the system what is read from now on, for files that are read through its page cache."""
        self._told -= unit.bytes
        while self._to_tell and self._told < AHEAD:
            item = self._to_tell.popleft()
            self._sources[item.name].will_fill(_begin_of(item), _begin_of(item) + item.bytes)
            self._told += item.bytes


def _begin_of(unit: Unit) -> int:
    """The place of a unit's first byte in its tensor."""
    return unit.first * (unit.bytes // max(1, unit.rows))
