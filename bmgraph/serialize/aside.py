"""Hidden folders beside a bundle, in which it is written; those that a killed process left are removed by the next save."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bmgraph.utils.locked_folder import LockedFolder, remove_abandoned


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
