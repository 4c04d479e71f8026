"""Memory for an engine's outputs, used again once the caller has let go of it.

A fresh array of a megabyte costs more page faults than a small operator costs time.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np

MOST = 4
"""How many arrays of one shape are kept."""

_OURS = 3
"""References to an array that nobody else holds, while it is looked at: the list, the loop, the count's argument."""


class Buffers:
    """Arrays by shape and dtype; one that is still referred to anywhere is never handed out again."""

    def __init__(self) -> None:
        self._kept: dict[tuple[tuple[int, ...], str], list[np.ndarray[Any, Any]]] = {}
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        """An array of that shape, whose contents are anything."""
        with self._lock:
            kept = self._kept.setdefault((shape, dtype.str), [])
            for array in kept:
                if sys.getrefcount(array) == _OURS:
                    return array
            made = np.empty(shape, dtype)
            if len(kept) < MOST:
                kept.append(made)
            if len(self._kept) > 64:  # many shapes: the oldest go
                self._kept.pop(next(iter(self._kept)))
            return made
