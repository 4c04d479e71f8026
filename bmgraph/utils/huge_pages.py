"""Memory of the system's own, and this process's large blocks in huge pages, where the system (Linux) has them."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

HUGE, COLLAPSE = 14, 25
"""Linux's numbers of advice: use huge pages from now on, and (since Linux 6.1) put what is there into some at once."""

SMALLEST = 2**21
"""Bytes of a huge page, which begins at a multiple of them."""


def mapped(size: int, huge: bool = False) -> mmap.mmap:
    """Zeros that this process alone sees, of which the system takes a page when it is written to, a huge one if wanted."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # this system has none
            made.madvise(mmap.MADV_HUGEPAGE)
    return made


def use_huge_pages() -> int:
    """Ask for huge pages in every anonymous block of 2 MiB or more that this process can write; returns their bytes.

    Weights are read from end to end for every new token: with pages of 4 KiB that is thousands of them. 0 on another system than
    Linux, and where it does not give huge pages on advice. Nothing depends on what the system makes of it.
    """
    if sys.platform != "linux":
        return 0
    advise = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)
    if advise is None:
        return 0
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    total = 0
    for begin, size in anonymous_blocks(Path("/proc/self/maps").read_text(encoding="utf-8")):
        if advise(begin, size, HUGE) == 0:
            advise(begin, size, COLLAPSE)
            total += size
    return total


def anonymous_blocks(maps: str) -> Iterator[tuple[int, int]]:
    """The address and size of whole huge pages in each private, writable block without a file; `maps` is the text of /proc/PID/maps."""
    for line in maps.splitlines():
        parts = line.split(maxsplit=5)
        named = len(parts) > 5 and parts[5].strip() not in ("", "[heap]")
        if len(parts) < 5 or parts[1] != "rw-p" or named or parts[4] != "0":
            continue
        low, high = (int(text, 16) for text in parts[0].split("-"))
        begin, end = -(-low // SMALLEST) * SMALLEST, high // SMALLEST * SMALLEST
        if end > begin:
            yield begin, end - begin
