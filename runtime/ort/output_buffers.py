"""Reuse of output memory, once no one refers to an earlier result any more.

The page faults of a new one-megabyte array cost more time than a small operator.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np

from bmgraph.runtime.generation.sampling import Array

_MAX_ARRAYS, _MAX_SHAPES = 4, 64
"""How many arrays of one shape and dtype are kept, and for how many shapes and dtypes."""

_OWN_REFERENCES = 3
"""`sys.getrefcount` of an unused array: referred to by the list, the loop variable and getrefcount's argument."""


class Buffers:
    """Arrays by shape and dtype; an array is reused only if nothing else refers to it, views included. Thread-safe."""

    def __init__(self) -> None:
        self._kept: dict[tuple[tuple[int, ...], str], list[Array]] = {}
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array with arbitrary contents."""
        with self._lock:
            kept = self._kept.setdefault((shape, dtype.str), [])
            for array in kept:
                if sys.getrefcount(array) == _OWN_REFERENCES:
                    return array
            array = np.empty(shape, dtype)
            if len(kept) < _MAX_ARRAYS:
                kept.append(array)
            if len(self._kept) > _MAX_SHAPES:  # drop the oldest
                self._kept.pop(next(iter(self._kept)))
            return array
