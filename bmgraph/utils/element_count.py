"""The number of elements of a shape from an untrusted file."""

from __future__ import annotations

from collections.abc import Iterable

ENDLESS = 2**63
"""Stands for every larger number: no tensor has as many elements."""


def element_count(sizes: Iterable[int]) -> int:
    """The product of sizes of at least 0, `ENDLESS` at most.

    A plain product of a million large sizes has megabytes of digits and takes minutes.
    """
    count, empty = 1, False
    for size in sizes:
        empty = empty or size == 0
        count = min(count * min(size or 1, ENDLESS), ENDLESS)
    return 0 if empty else count
