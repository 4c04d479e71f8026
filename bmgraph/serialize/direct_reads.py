"""Reads an opened file past the system's page cache (Linux's O_DIRECT), which spares the processor a copy and page faults."""

from __future__ import annotations

import mmap
import os

PAGE = 4096
"""Places, sizes and memory of reads past the page cache are multiples of it; no disk asks for more."""


class DirectReads:
    """Reads at places of one file; closed with its last reference. Obtain it from `open_direct`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read(self, begin: int, end: int, pages: memoryview) -> memoryview:
        """The bytes from `begin` on, up to `end` at most, as they lie in `pages`; empty at the end of the file.

        `pages` begins at a page and has whole pages, at least two.
        """
        first = begin // PAGE * PAGE
        size = min(len(pages), -(-(end - first) // PAGE) * PAGE)
        count = os.preadv(self._descriptor, [pages[:size]], first)
        return pages[begin - first : max(begin - first, min(count, end - first))]


def open_direct(descriptor: int) -> DirectReads | str:
    """Open the very file of a descriptor once more, for reads past the page cache; else why it cannot be done.

    What the file holds in its first bytes is read for trial: some file systems refuse only then.
    """
    if not (hasattr(os, "O_DIRECT") and hasattr(os, "preadv")):
        return "this system has no O_DIRECT"
    try:
        again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        return f"O_DIRECT is refused: {error.strerror}"
    reads = DirectReads(again)
    if not os.path.samestat(os.fstat(again), os.fstat(descriptor)):
        return "/proc/self/fd leads to another file"
    try:
        reads.read(0, 1, memoryview(mmap.mmap(-1, PAGE)))
    except OSError as error:
        return f"O_DIRECT is refused: {error.strerror}"
    return reads
