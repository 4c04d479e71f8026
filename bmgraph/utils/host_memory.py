"""Memory of this process that the C library keeps for later."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back_memory() -> None:
    """Collect garbage, and return freed memory to the system where the C library can be asked to (glibc).

    After large temporaries it keeps what they took, as much as a gigabyte, for the process alone.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
