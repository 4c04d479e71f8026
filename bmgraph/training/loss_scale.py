"""The dynamic loss scale of a step in float16 (Micikevicius et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass

from bmgraph.errors import InputError

LEAST = 1.0
"""A gradient that overflows under this scale is no matter of scaling."""
MOST = 2.0**40


@dataclass(frozen=True)
class LossScale:
    """How the loss is scaled in float16: halved where a gradient overflows, doubled after so many steps without overflow.

    start: the first scale, a power of two between 1 and 2**40. double_after: that number of steps.

    Raises InputError for a number that is not valid.

    Example:
        >>> LossScale().after(65536.0, 0, overflow=True)
        (32768.0, 0)
    """

    start: float = 2.0**16
    double_after: int = 2000

    def __post_init__(self) -> None:
        if not (LEAST <= self.start <= MOST and self.start.hex().startswith("0x1.0000000000000p")):
            raise InputError(f"start={self.start}: give a power of two between 1 and 2**40, such as 65536.0")
        if self.double_after < 1:
            raise InputError(f"double_after={self.double_after}: give a number of steps, 1 or more")

    def after(self, scale: float, good: int, overflow: bool) -> tuple[float, int]:
        """The scale and the number of steps since it last changed, after a step."""
        if overflow:
            return max(scale / 2, LEAST), 0
        if good + 1 < self.double_after:
            return scale, good + 1
        return min(2 * scale, MOST), 0
