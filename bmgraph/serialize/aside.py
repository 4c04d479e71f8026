"""Hidden folders beside a bundle, in which it is written; those that a killed process left are removed by the next save."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bmgraph.utils.locked_folder import LockedFolder, remove_abandoned

_ASIDE = re.compile(r"(\..{1,100}-bmgraph-)[A-Za-z0-9_]{8}\Z", re.DOTALL)


def new_folder_aside(path: Path) -> LockedFolder:
    """A new hidden folder beside `path`, locked while this process lives; its maker removes it."""
    return LockedFolder(path.parent, _prefix(path))


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """A new hidden folder beside `path`, locked while this process lives; removed at the end if it is still there."""
    aside = new_folder_aside(path)
    try:
        yield aside.path
    finally:
        aside.delete()


def remove_left_behind(path: Path) -> None:
    """Remove folders aside of `path` whose writers have died; those of living ones are locked."""
    remove_abandoned(path.parent, _prefix(path))


def remove_all_left_behind(folder: Path) -> None:
    """The same for all paths in a folder, as that of a run's checkpoints, whose names do not come again."""
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for prefix in {found[1] for name in names if (found := _ASIDE.match(name))}:
        remove_abandoned(folder, prefix)


def _prefix(path: Path) -> str:
    return f".{path.name[:100]}-bmgraph-"


def user_modes(folder: Path) -> tuple[int, int]:
    """The permissions that the user's umask gives a new file and a new folder."""
    probe = folder / ".mode"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        mode = os.fstat(descriptor).st_mode & 0o666
    finally:
        os.close(descriptor)
        probe.unlink()
    return mode, mode | (mode & 0o444) >> 2
