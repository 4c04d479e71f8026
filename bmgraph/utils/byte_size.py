"""Numbers of bytes in text, such as "512MiB" or "2GB"."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]i?)?B")


def bytes_of(text: str) -> int | None:
    """The number of bytes that a text says; None for one that says no such number.

    Example:
        >>> bytes_of("1.5GB"), bytes_of("2 MiB"), bytes_of("much")
        (1500000000, 2097152, None)
    """
    found = _SIZE.fullmatch(text.strip())
    return int(float(found[1]) * _UNITS[found[2] or ""]) if found else None
