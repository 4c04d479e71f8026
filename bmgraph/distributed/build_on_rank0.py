"""Builds an engine on rank 0 alone; the other ranks load the saved result."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from bmgraph.distributed.process_group import Ranks
from bmgraph.utils.locked_folder import LockedFolder, remove_abandoned

PREFIX = "bmgraph-ranks-"


class Saved(Protocol):
    """What rank 0 builds and the other ranks load."""

    def save(self, path: str) -> None:
        """Write it to a folder."""


Built = TypeVar("Built", bound=Saved)


def lower_once(ranks: Ranks, lower: Callable[[], Built], load: Callable[[str], Built]) -> Built:
    """The result of `lower` on rank 0; on the other ranks the same engine, by `load` of the path where rank 0 saved it.

    The path is in the folder for temporary files, which all ranks must share (set TMPDIR to choose another); it is
    deleted when rank 0 exits. An error of `lower` on rank 0 is raised on all ranks.
    """
    if ranks.size == 1:
        return lower()
    engine: Built | None = None
    path = ""
    with ranks.on_rank0() as is_rank0:
        if is_rank0:
            engine = lower()
            place = Path(tempfile.gettempdir())
            remove_abandoned(place, PREFIX)
            folder = LockedFolder(place, PREFIX)
            atexit.register(folder.delete)
            path = str(folder.path / "engine")
            engine.save(path)
    path = ranks.broadcast_text(path)
    with ranks.fail_together():
        if engine is None:
            engine = load(path)
    return engine
