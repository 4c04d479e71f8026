"""Budgets of bytes and of time, read and written."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from bmgraph.errors import InputError
from bmgraph.utils.byte_size import bytes_of

_TIME = re.compile(r"(\d+(?:\.\d+)?) ?(us|ms|s)")
_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True)
class Budget:
    """What may be spent at most: bytes, milliseconds, or both; None: no limit."""

    bytes: int | None
    milliseconds: float | None

    @staticmethod
    def of(size: str, latency: str) -> Budget:
        """The budget of two texts, such as "60MB" and "20ms", empty for none. Raises InputError for what is not one."""
        found = bytes_of(size) if size else None
        if size and not found:
            raise InputError(f"bytes={size!r}: give a size above 0, such as '60MB' or '512KiB'")
        time = _TIME.fullmatch(latency.strip())
        milliseconds = float(time[1]) * _MILLISECONDS[time[2]] if time else None
        if latency and not milliseconds:
            raise InputError(f"latency={latency!r}: give a time above 0, such as '20ms', '1.5s' or '800us'")
        if found is None and milliseconds is None:
            raise InputError("a budget is missing: give bytes='60MB', latency='20ms', or both")
        return Budget(found, milliseconds)

    def used(self, size: float, milliseconds: float | None) -> float:
        """The share of the budget that is used, of the scarcer of the two: above 1 does not fit."""
        shares = [0.0 if self.bytes is None else size / self.bytes]
        if self.milliseconds is not None:
            shares.append(math.inf if milliseconds is None else milliseconds / self.milliseconds)
        return max(shares)

    @property
    def text(self) -> str:
        """The budget as options."""
        found = [] if self.bytes is None else [f"bytes={size_up(self.bytes)}"]
        return ", ".join(found + ([] if self.milliseconds is None else [f"latency={self.milliseconds:g}ms"]))

    def enough(self, size: int, milliseconds: float | None) -> str:
        """The budget of the same kind that has room for these, as options."""
        fits = None if milliseconds is None else math.ceil(1e3 * milliseconds) / 1e3
        return Budget(
            None if self.bytes is None else max(size, self.bytes),
            None if self.milliseconds is None or fits is None else max(fits, self.milliseconds),
        ).text


def size_up(size: int) -> str:
    """A number of bytes as a budget that is no less, with three digits or more."""
    unit, scale = next(
        item
        for item in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("B", 1))
        if size >= item[1] or item[1] == 1
    )
    return f"{size}B" if scale == 1 else f"{math.ceil(100 * size / scale) / 100:g}{unit}"
