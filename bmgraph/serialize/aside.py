"""Hidden folders beside a bundle, in which it is written; those that a killed process left are removed by the next save."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_lock: Any
try:
    from fcntl import LOCK_EX, LOCK_NB
    from fcntl import flock as _lock
except ImportError:  # Windows: nothing is removed, since nobody can tell whether its writer lives
    _lock = None

_TAG = "bmgraph"
_ATTEMPTS = 100


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """A new hidden folder beside `path`, locked while this process lives; removed at the end if it is still there."""
    for _ in range(_ATTEMPTS):
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name[:100]}-{_TAG}-", dir=path.parent))
        descriptor = _locked(aside)
        if _lock is None or descriptor is not None:
            break
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def remove_left_behind(path: Path) -> None:
    """Remove folders aside of `path` whose writers have died; those of living ones are locked."""
    if _lock is None:
        return
    ours = re.compile(re.escape(f".{path.name[:100]}-{_TAG}-") + r"[A-Za-z0-9_]{8}\Z")
    for name in os.listdir(path.parent):
        if ours.match(name):
            descriptor = _locked(path.parent / name, wait=False)
            if descriptor is not None:
                shutil.rmtree(path.parent / name, ignore_errors=True)
                os.close(descriptor)


def _locked(folder: Path, wait: bool = True) -> int | None:
    """A descriptor that locks a folder; None if it has gone or, without `wait`, is locked by another process."""
    if _lock is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        _lock(descriptor, LOCK_EX if wait else LOCK_EX | LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder, follow_symlinks=False)):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


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
