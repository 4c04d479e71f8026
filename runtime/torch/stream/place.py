"""Where streamed weights are used: in the host's memory, into which files are read, or in that of a device, to which they are copied."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from bmgraph.serialize.opened import PART_PAGES
from bmgraph.utils.huge_pages import SMALLEST, mapped
from bmgraph.utils.stored_tensor import Source

READERS = 4
"""How many reads are asked of the disk at a time."""

DEVICE_READERS = 8
"""How many threads copy from the system's page cache for a device: one alone is slower than the way to the device."""

STAGED = 4 * PART_PAGES
"""Bytes that a thread reads for a device at a time."""

DEVICE_KERNELS = 80 * 2**20
"""Bytes that libraries of matrix products and torch's allocator take on a GPU."""


class Room(Protocol):
    """Memory at one place: `bytes` is u8[size]."""

    bytes: torch.Tensor

    def give_back(self, low: int, high: int) -> None:
        """Give a part to the system, where it takes it; it gives it again when it is written to."""


class Landing(Protocol):
    """What one thread reads through."""

    def fill(self, source: Source, into: torch.Tensor, begin: int) -> None:
        """Let the bytes of a source from `begin` on come to memory of the place, u8[n]; they may still be on their way when this returns."""


class Place(ABC):
    """Memory for weights, and how what is read comes there. A run of a graph is between `begin` and `end`.

    device: where calls run. piece: bytes that a thread reads at a time, a multiple of PART_PAGES. landing_bytes: what of the limit threads read
    through. kernels: bytes that libraries of matrix products, the allocator and this engine take beside what calls return. gives_back: whether
    rooms can be given back in parts.
    """

    device: torch.device
    piece: int
    landing_bytes: int
    kernels: int
    gives_back: bool

    @abstractmethod
    def room(self, size: int) -> Room:
        """New memory."""

    @abstractmethod
    def landings(self) -> Sequence[Landing]:
        """One for each thread that reads; the same each time."""

    @abstractmethod
    def way(self, sources: Iterable[Source]) -> str:
        """Prepare sources to be read; in words, how they are."""

    @abstractmethod
    def told(self, source: Source) -> bool:
        """Whether the system is to be told what is read of a source: where it reads past its page cache, it would read all a second time."""

    def begin(self) -> None:
        """A run begins, on this thread."""
        return

    def end(self) -> None:
        """The run has ended: nothing is read any more."""
        return

    def taken(self, memory: torch.Tensor, new: bool) -> None:
        """Memory is going to be filled, which was `dropped` before, or is `new`."""
        return

    def dropped(self, memory: torch.Tensor) -> None:
        """No call reads this memory from now on."""
        return

    def filled(self) -> Any:
        """All that memory is filled with has been asked for: what `arrived` waits for."""
        return None

    def arrived(self, filled: Any) -> None:
        """Calls from now on read memory that was filled."""
        return


class HostPlace(Place):
    """The host's memory. Files are read past the system's page cache where they can be."""

    device = torch.device("cpu")
    piece = PART_PAGES
    landing_bytes = READERS * PART_PAGES
    kernels = 12 * 2**20
    gives_back = True

    def __init__(self) -> None:
        self._landings: list[_Pages] = []

    def room(self, size: int) -> Room:
        """Memory that this process alone sees."""
        return _HostRoom(size)

    def landings(self) -> Sequence[Landing]:
        """Pages for reads past the page cache."""
        if not self._landings:
            self._landings = [_Pages(pages) for pages in huge_pages(READERS, PART_PAGES)]
        return self._landings

    def way(self, sources: Iterable[Source]) -> str:
        """Let them be read past the page cache."""
        reasons = [source.bypass_cache() for source in sources]
        through = "; ".join(sorted({item for item in reasons if item}))
        past = "" if all(reasons) else "past the system's page cache"
        return " or ".join(filter(None, [past, through and f"through the system's page cache ({through})"]))

    def told(self, source: Source) -> bool:
        """Where the source is read through the page cache."""
        return bool(source.bypass_cache())


class DevicePlace(Place):
    """The memory of a device such as a GPU. Files are read through the system's page cache, which holds what the host has room for, into
    pinned memory, and go from there on a stream of their own while others are used.

    A copy waits until the calls that read its memory before have run, and calls until what they read has come; the host waits for neither.
    """

    piece = STAGED
    landing_bytes = 0
    gives_back = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kernels = DEVICE_KERNELS if device.type == "cuda" else HostPlace.kernels
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._calls: torch.cuda.Stream | None = None
        self._dropped: list[tuple[int, int, torch.cuda.Event]] = []
        """Memory, from one address to another, and the event behind the last call that reads it."""
        self._landings: list[_Staging] = []

    def room(self, size: int) -> Room:
        """Memory of the device, of torch's allocator, which gives it for the stream of the run's calls."""
        with torch.cuda.stream(self._calls):
            return _DeviceRoom(torch.empty(size, dtype=torch.uint8, device=self.device))

    def landings(self) -> Sequence[Landing]:
        """Pinned memory."""
        while len(self._landings) < DEVICE_READERS:
            self._landings.append(_Staging(self._copies))
        return self._landings

    def way(self, sources: Iterable[Source]) -> str:
        """Nothing is to be prepared."""
        return f"through the system's page cache to {self.device}"

    def told(self, source: Source) -> bool:
        """Always."""
        return True

    def begin(self) -> None:
        """Copies of this run come behind what the device was asked for before."""
        if self._copies is not None:
            before, self._calls = self._calls, torch.cuda.current_stream(self.device)
            if before is not None and before != self._calls:
                before.synchronize()  # it may still read what this run drops
            self._copies.wait_stream(self._calls)
            self._dropped.clear()

    def end(self) -> None:
        """What the device is asked for from now on comes behind the copies."""
        if self._copies is not None and self._calls is not None:
            self._calls.wait_stream(self._copies)

    def taken(self, memory: torch.Tensor, new: bool) -> None:
        """Copies wait for the last calls that read this memory; of new memory, which torch's allocator may have had back from any call, for all
        calls so far."""
        if self._copies is None or self._calls is None:
            return
        if new:
            self._copies.wait_stream(self._calls)
            return
        low, high = _addresses(memory)
        left = []
        for first, last, event in self._dropped:
            if first < high and low < last:
                self._copies.wait_event(event)
            if not (low <= first and last <= high):
                left.append((first, last, event))
        self._dropped = left

    def dropped(self, memory: torch.Tensor) -> None:
        """Remember which call is the last one so far."""
        if self._calls is not None:
            self._dropped.append((*_addresses(memory), self._calls.record_event()))

    def filled(self) -> Any:
        """An event behind the copies so far."""
        return None if self._copies is None else self._copies.record_event()

    def arrived(self, filled: Any) -> None:
        """Calls wait for the event."""
        if self._calls is not None and filled is not None:
            self._calls.wait_event(filled)


class _HostRoom:
    """Memory that this process alone sees, in huge pages where the system has them."""

    def __init__(self, size: int) -> None:
        self._mapped = mapped(size, huge=True)
        self.bytes = torch.frombuffer(self._mapped, dtype=torch.uint8)

    def give_back(self, low: int, high: int) -> None:
        """Let the system take whole pages."""
        if hasattr(self._mapped, "madvise"):
            self._mapped.madvise(mmap.MADV_DONTNEED, low, high - low)


class _DeviceRoom:
    def __init__(self, memory: torch.Tensor) -> None:
        self.bytes = memory

    def give_back(self, low: int, high: int) -> None:
        """Nothing: a device's memory is given back whole."""
        return


class _Pages:
    """Memory at the beginning of a page, through which reads past the page cache go."""

    def __init__(self, pages: memoryview) -> None:
        self._pages = pages

    def fill(self, source: Source, into: torch.Tensor, begin: int) -> None:
        """Read into the memory of the host."""
        source.fill(into.numpy().data, begin, self._pages)


class _Staging:
    """Two pieces of pinned memory: one is read into while the other is copied."""

    def __init__(self, copies: torch.cuda.Stream | None) -> None:
        self._copies = copies
        pinned = copies is not None
        self._pieces = [torch.empty(STAGED, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._next = 0

    def fill(self, source: Source, into: torch.Tensor, begin: int) -> None:
        """Read into one of them as soon as it was copied, and ask for its copy."""
        index, self._next = self._next, 1 - self._next
        before = self._copied[index]
        if before is not None:
            before.synchronize()
        piece = self._pieces[index]
        if len(into) > len(piece):  # a source that is read whole
            piece = torch.empty(len(into), dtype=torch.uint8)
        piece = piece[: len(into)]
        source.fill(piece.numpy().data, begin)
        if self._copies is None:
            into.copy_(piece)
            return
        with torch.cuda.stream(self._copies):
            into.copy_(piece, non_blocking=piece.is_pinned())
            self._copied[index] = self._copies.record_event()


def huge_pages(count: int, size: int) -> list[memoryview]:
    """Parts of `size` bytes of memory that begins where a huge page can: a read of the disk into one of them is one request, where small
    pages, which lie anywhere, are cut into several, and take twice as long on some disks."""
    block = mapped(count * size + SMALLEST, huge=True)
    begin = -torch.frombuffer(block, dtype=torch.uint8).data_ptr() % SMALLEST
    whole = memoryview(block)[begin : begin + count * size]
    return [whole[place * size : (place + 1) * size] for place in range(count)]


def _addresses(memory: torch.Tensor) -> tuple[int, int]:
    return memory.data_ptr(), memory.data_ptr() + memory.nbytes
