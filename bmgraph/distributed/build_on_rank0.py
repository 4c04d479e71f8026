"""Lowering by one rank for all: the others load what it made."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bmgraph.distributed.process_group import Ranks


def lower_once(ranks: Ranks, lower: Callable[[], Any], load: Callable[[str], Any]) -> Any:
    """What `lower` gives on rank 0; on the others the same engine, loaded from where rank 0 saved it.

    That is a folder for temporary files, which all ranks must see (TMPDIR names another); it goes with rank 0. Raises
    on all ranks what `lower` raises on rank 0.
    """
    if ranks.size == 1:
        return lower()
    engine, place = None, ""
    with ranks.first_alone() as first:
        if first:
            engine = lower()
            folder = Path(tempfile.mkdtemp(prefix="bmgraph-ranks-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            place = str(folder / "engine")
            engine.save(place)
    place = ranks.told_by_first(place)
    with ranks.together():
        if engine is None:
            engine = load(place)
    return engine
