"""Decides, for one run of a graph, what weights stay in memory, and in which order the others are read, within a limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PAGE = 4096


@dataclass(frozen=True, order=True)
class Unit:
    """What is read at once: some rows of a tensor, or all of it."""

    name: str
    first: int
    rows: int
    bytes: int

    @property
    def room(self) -> int:
        """The bytes of memory that it takes: whole pages."""
        return -(-self.bytes // PAGE) * PAGE


@dataclass(frozen=True)
class Use:
    """A unit is needed from the step `begin` of a run up to the step `end`."""

    unit: Unit
    begin: int
    end: int


@dataclass(frozen=True)
class Schedule:
    """What stays, and what is read in which order. `capacity`: the bytes that weights may take that do not stay.

    `reads` holds all uses in the order of their first step, those of units that stay too: these are read once.
    """

    limit: int
    held: int
    """Bytes of small tensors and buffers, which are always in memory."""
    activations: int
    """Bytes of inputs, of what the graph computes, and of what kernels take inside."""
    stays: frozenset[Unit]
    reads: tuple[Use, ...]
    capacity: int
    way: str = ""
    """How the files are read, in words."""
    apart: int = 0
    """Bytes of `capacity` for what finds no place in the block of memory that is read into: where its free parts cannot be given back."""

    @property
    def staying(self) -> int:
        """Bytes of the units that stay."""
        return sum(unit.room for unit in self.stays)

    @property
    def read(self) -> int:
        """Bytes that a run reads once what stays is there."""
        return sum(use.unit.bytes for use in self.reads if use.unit not in self.stays)

    @property
    def reading(self) -> int:
        """The most bytes in memory of units that do not stay."""
        return min(self.capacity, sum(use.unit.room for use in self.reads if use.unit not in self.stays))

    @property
    def block(self) -> int:
        """The size of the block of memory that is read into."""
        return min(self.reading, self.capacity - self.apart)

    @property
    def peak(self) -> int:
        """The predicted largest number of bytes in memory: never above the limit."""
        return self.held + self.activations + self.staying + self.reading

    def __str__(self) -> str:
        count = sum(use.unit not in self.stays for use in self.reads)
        lines = [
            f"limit {_mega(self.limit)}, predicted peak {_mega(self.peak)}: {_mega(self.staying)} of weights stay, {_mega(self.capacity)} "
            f"to read ahead, {_mega(self.held)} of small tensors, {_mega(self.activations)} of activations; {_mega(self.read)} "
            f"in {count} reads a call{self.way and ', '}{self.way}"
        ]
        for use in self.reads:
            unit = use.unit
            what = "stays" if unit in self.stays else f"steps {use.begin} to {use.end}"
            lines.append(f"  {unit.name}[{unit.first}:{unit.first + unit.rows}] {_mega(unit.bytes)}: {what}")
        return "\n".join(lines)

    def summary(self) -> str:
        """The first line."""
        return str(self).splitlines()[0]


def _mega(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def plan(
    uses: Sequence[Use], limit: int, held: int, activations: int, way: str = "", gives_back: bool = True
) -> Schedule | None:
    """The schedule that reads least within a limit; None if there is none. `gives_back`: whether memory can be given back in parts.

    Units stay as far as there is room beside what must be in memory at a time and the largest read behind it, so that it is read
    while the run computes. Those that stay are spread evenly, as in BMInf, so that reading does not wait for computing.
    """
    ordered = sorted(uses, key=lambda use: (use.begin, use.end))
    room = limit - held - activations
    units = list(dict.fromkeys(use.unit for use in ordered))
    if room < needed(ordered, frozenset()):
        return None
    stays: set[Unit] = set()
    taken = 0
    if sum(unit.room for unit in units) <= room:
        stays = set(units)
        taken = sum(unit.room for unit in units)
    else:
        for unit in _spread(units):
            if taken + unit.room > room:
                continue
            stays.add(unit)
            apart = 0 if gives_back else needed(ordered, stays)
            if taken + unit.room + apart + needed_ahead(ordered, stays) > room:
                stays.discard(unit)
            else:
                taken += unit.room
    apart = 0 if gives_back else needed(ordered, stays)
    return Schedule(limit, held, activations, frozenset(stays), tuple(ordered), room - taken, way, apart)


def needed(ordered: Sequence[Use], stays: frozenset[Unit] | set[Unit]) -> int:
    """The most bytes of units that do not stay and that one step needs together; uses are in the order of their first step."""
    return max(_live(ordered, stays), default=0)


def needed_ahead(ordered: Sequence[Use], stays: frozenset[Unit] | set[Unit]) -> int:
    """The same, each with the read behind it."""
    live = _live(ordered, stays)
    sizes = [use.unit.room for use in ordered if use.unit not in stays]
    return max((own + then for own, then in zip(live, [*sizes[1:], 0])), default=0)


def _live(ordered: Sequence[Use], stays: frozenset[Unit] | set[Unit]) -> list[int]:
    """For each use that is read: the bytes in memory at its first step, of those read until then."""
    found: list[int] = []
    alive: list[Use] = []
    for use in ordered:
        if use.unit in stays:
            continue
        alive = [*(item for item in alive if item.end >= use.begin), use]
        found.append(sum(item.unit.room for item in alive))
    return found


def _spread(units: Sequence[Unit]) -> list[Unit]:
    """The units in an order of which each beginning is spread evenly: by the bits of their places, read backwards."""
    width = max(1, len(units) - 1).bit_length()
    return [unit for _, unit in sorted((_reversed(place, width), unit) for place, unit in enumerate(units))]


def _reversed(number: int, width: int) -> int:
    return int(f"{number:0{width}b}"[::-1], 2)


def smallest(uses: Sequence[Use], held: int, activations: int) -> int:
    """The smallest limit that there is a schedule for."""
    ordered = sorted(uses, key=lambda use: (use.begin, use.end))
    return held + activations + needed(ordered, frozenset())


Sizes = Mapping[str, int]
