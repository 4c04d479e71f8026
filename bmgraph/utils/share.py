"""Shares of a number of things, without the errors of binary fractions."""

from __future__ import annotations

import math


def share_of(share: float, count: int) -> int:
    """How many of `count` things a share is, rounded down.

    Example:
        >>> int(0.29 * 100), share_of(0.29, 100)
        (28, 29)
    """
    return math.floor(share * count * (1 + 1e-12))
