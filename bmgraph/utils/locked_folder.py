"""New folders that are locked while their maker lives, so that those which a killed process left can be told and removed."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

_lock: Any
try:
    from fcntl import LOCK_EX, LOCK_NB
    from fcntl import flock as _lock
except ImportError:  # Windows: nothing is removed, since nobody can tell whether its maker lives
    _lock = None

_ATTEMPTS = 100


class LockedFolder:
    """A new folder `prefix` + 8 characters in `parent`, locked while this process, or a forked child, lives.

    `delete` leaves it alone in a forked child.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        self._maker = os.getpid()
        for _ in range(_ATTEMPTS):
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            self._descriptor = _locked(self.path)
            if _lock is None or self._descriptor is not None:
                break

    def delete(self) -> None:
        """Delete the folder, if it is still there, and its lock."""
        if os.getpid() != self._maker:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the folders of `LockedFolder` in `parent` whose makers have died, if they are of this user."""
    try:
        names = os.listdir(parent) if _lock is not None else []
    except OSError:  # a folder that may be written to, and not listed
        return
    ours = re.compile(re.escape(prefix) + r"[A-Za-z0-9_]{8}\Z")
    for name in names:
        if ours.match(name):
            descriptor = _locked(parent / name, wait=False)
            if descriptor is not None:
                if os.fstat(descriptor).st_uid == os.getuid():
                    shutil.rmtree(parent / name, ignore_errors=True)
                os.close(descriptor)


def lock_folder(folder: Path) -> int | None:
    """A descriptor that locks a folder while it is open, in this process or a forked child; None where the system has no locks.

    Raises BlockingIOError where another process has locked it, FileNotFoundError where it has gone.
    """
    if _lock is None:
        return None
    descriptor = _locked(folder, wait=False)
    if descriptor is None:
        folder.stat()
        raise BlockingIOError(f"{folder} is locked by another process")
    return descriptor


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
