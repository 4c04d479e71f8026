"""Memory of this process that the C library keeps for later."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterable

import torch

from bmgraph.utils.collecting import is_large

MAPPED = 2**20
"""Bytes of a block of memory from which on it is mapped by itself, and given back as soon as it is freed."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's numbers of parameters of `mallopt`."""


def map_large_blocks(weights: Iterable[torch.Tensor]) -> None:
    """For a large model, have the C library (glibc) map large blocks of memory by themselves from now on, in this process.

    It does so at first, and then puts blocks as large as 32 MB in its heap, where what is freed lies between other blocks: a
    seventh of the memory of a training step. Does nothing where the user has set its thresholds (`MALLOC_MMAP_THRESHOLD_`).
    """
    if sys.platform != "linux" or {"MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & set(os.environ):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None and is_large(weights):
        set_option(MMAP_THRESHOLD, MAPPED)
        set_option(TRIM_THRESHOLD, 64 * MAPPED)  # else the end of the heap comes and goes with every step


def give_back_memory() -> None:
    """Collect garbage, and return freed memory to the system where the C library can be asked to (glibc).

    After large temporaries it keeps what they took, as much as a gigabyte, for the process alone.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
