"""Which delta is in which entry of an engine's tables, and which entries running calls read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from bmgraph.errors import InputError
from bmgraph.utils.did_you_mean import did_you_mean

LONGEST_WAIT = 10.0
"""Seconds that a change waits for the end of calls that read the entry which it needs."""

Names = tuple[str, ...]
"""The names of the entries 1, 2, ...; "" for a free one."""


class Slots:
    """The names of entries, and how many calls read each. Thread-safe.

    An entry is written only while no call reads it, and a name goes from one entry to another at one moment: a call reads the
    deltas that its names had when it began, whole.
    """

    def __init__(self, names: Sequence[str], wait: float = LONGEST_WAIT) -> None:
        self._changed, self._one_change = threading.Condition(), threading.Lock()
        self._names = list(names)
        self._readers = [0] * (len(names) + 1)
        self._versions = [0] * (len(names) + 1)
        self._rewritten: set[int] = set()
        """Entries that keep their name while they are written: calls that want them wait."""
        self._wait = wait

    @property
    def names(self) -> Names:
        """The names of the entries now."""
        with self._changed:
            return tuple(self._names)

    def hold(self, resolve: Callable[[Names], Sequence[int]]) -> Hold:
        """Keep the entries that `resolve` makes of the names now from being written, until the hold is released.

        Raises what `resolve` raises.
        """
        with self._changed:
            numbers = resolve(tuple(self._names))
            while self._rewritten.intersection(numbers):
                self._changed.wait()
                numbers = resolve(tuple(self._names))
            for number in set(numbers):
                self._readers[number] += 1
            versions = [self._versions[number] for number in numbers]
        return Hold(self, numbers, versions)

    def release(self, numbers: Sequence[int]) -> None:
        """End what `hold` began; `Hold.release` calls it."""
        with self._changed:
            for number in set(numbers):
                self._readers[number] -= 1
            self._changed.notify_all()

    def put(self, name: str, write: Callable[[int], None], instead: bool = False) -> None:
        """Let `write` fill an entry that no call reads, and give it the name; with `instead` the entry that has it becomes free.

        Raises InputError where the name is taken (with `instead`: is not), all entries are, or calls read what is needed for too
        long.
        """
        with self._one_change:
            number, old = self._claimed(name, instead)
            self._versions[number] += 1  # nobody reads it
            written = False
            try:
                write(number)
                written = True
            finally:
                with self._changed:
                    if written or number == old:  # a half-written entry has no name
                        self._rename(old, "")
                    if written:
                        self._rename(number, name)
                    self._rewritten.discard(number)
                    self._changed.notify_all()

    def drop(self, name: str) -> None:
        """Free the entry of a name; calls that read it go on. Raises InputError for an unknown name."""
        with self._one_change, self._changed:
            self._rename(self._number(name), "")
            self._changed.notify_all()

    def _rename(self, number: int, name: str) -> None:
        if number:
            self._names[number - 1] = name

    def _number(self, name: str) -> int:
        if not name or name not in self._names:
            known = [item for item in self._names if item]
            raise InputError(
                f"no delta is called {name!r}{did_you_mean(name, known)} (there are {', '.join(known) or 'none'})"
            )
        return self._names.index(name) + 1

    def _claimed(self, name: str, instead: bool) -> tuple[int, int]:
        """An entry that nothing reads, and the one that has the name (0 for none), which may be the same."""
        with self._changed:
            if instead:
                old = self._number(name)
            elif name in self._names:
                raise InputError(f"there is a delta {name!r} already: swap({name!r}, folder) replaces it")
            else:
                old = 0
            if not old and all(self._names):
                raise InputError(
                    f"all {len(self._names)} entries are taken ({', '.join(self._names[:5])}{', ...' if len(self._names) > 5 else ''}): "
                    "remove a delta, or compile with a larger Deltas(capacity=)"
                )
            if all(self._names):
                self._rewritten.add(old)
            if not self._changed.wait_for(lambda: self._unread(old), self._wait):
                self._rewritten.discard(old)
                self._changed.notify_all()
                raise InputError(
                    f"calls that run read every entry that {name!r} could be put into: let them end (a stream of generate must be "
                    f"read to its end, or closed); waited {self._wait:g} s"
                )
            return self._unread(old), old

    def _unread(self, old: int) -> int:
        """A free entry that nothing reads, or `old` if it is to be written; 0 for none."""
        free = [n for n, name in enumerate(self._names, 1) if not name or n in self._rewritten]
        return next((n for n in free if not self._readers[n]), 0)


class Hold:
    """Entries that a call reads; they may be written again when it is released, at the latest when nothing refers to it.

    `versions`: how often each was written before.
    """

    def __init__(self, slots: Slots, numbers: Sequence[int], versions: Sequence[int]) -> None:
        self.numbers, self.versions = numbers, versions
        self._slots: Slots | None = slots

    def release(self) -> None:
        """Let the entries be written again; does nothing the second time."""
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.release(self.numbers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()
