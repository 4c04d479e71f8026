"""How much memory the weights of one program may take."""

from __future__ import annotations

import os
from pathlib import Path

SHARE = 0.5
"""The share of the free memory that the weights of a program may take; comparisons and passes need the rest."""

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_budget() -> int:
    """How many bytes of weights are kept in memory: SHARE of what is free now, within a container's limit."""
    return int(SHARE * free_memory())


def free_memory() -> int:
    """How many bytes of memory are free now, within a container's limit."""
    return min([_available(), *_container_limits()])


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 8 * 2**30


def _container_limits() -> list[int]:
    found = []
    for path in _LIMITS:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            found.append(int(text))
    return found
