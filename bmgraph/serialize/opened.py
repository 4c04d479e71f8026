"""Folders and files that are opened once, so that what was checked is what is read.

A folder may be saved anew under its name while it is read: its path then leads to other files. What was opened stays what
it was, even after its name has gone.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bmgraph.errors import BundleError

_BY_FOLDER = os.open in os.supports_dir_fd and os.stat in os.supports_dir_fd and os.scandir in os.supports_fd
"""Whether this system opens files by an opened folder instead of its name (Windows does not)."""


class OpenedFile:
    """A regular file, opened for reading; closed with its last reference. `path` is its name in errors."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)

    @property
    def status(self) -> os.stat_result:
        """The status of the opened file."""
        return os.fstat(self._descriptor)

    @contextmanager
    def stream(self) -> Iterator[BinaryIO]:
        """The file's bytes from the first on; one reader at a time, since all share one position."""
        with os.fdopen(os.dup(self._descriptor), "rb") as stream:
            stream.seek(0)
            yield stream


def open_regular_file(file: Path, folder: int | None = None) -> OpenedFile:
    """Open a regular file, by its name in the opened `folder` if given.

    Raises BundleError, without blocking, if it is missing, a link, a pipe, a folder or a device.
    """
    where = file if folder is None else Path(file.name)
    try:
        found = os.stat(where, dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        raise BundleError(f"bundle {file.parent} lacks {file.name!r}") from error
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{file.name!r} in bundle {file.parent} is not a regular file")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(where, flags | getattr(os, "O_BINARY", 0), dir_fd=folder)
    except OSError as error:
        raise BundleError(
            f"{file.name!r} in bundle {file.parent} cannot be read: {error.strerror}"
        ) from error
    opened = OpenedFile(file, descriptor)
    if not stat.S_ISREG(opened.status.st_mode):
        raise BundleError(f"{file.name!r} in bundle {file.parent} is not a regular file")
    return opened


def open_user_file(file: Path) -> OpenedFile:
    """Open a file of a folder that the user names, which may be a link within that folder, or into Hugging Face's cache.

    In that cache, `snapshots/REVISION` holds links to files of `blobs` beside `snapshots`. Raises BundleError for a link
    that leads anywhere else, and as `open_regular_file` does.
    """
    if not file.is_symlink():
        return open_regular_file(file)
    folder = file.parent.resolve()
    allowed = [folder, *(parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots")]
    target = file.resolve()
    if not any(target.is_relative_to(place) for place in allowed):
        raise BundleError(
            f"{file.name!r} in {file.parent} is a link to {target}, outside of its folder and of a cache's blobs: put the "
            "file itself there"
        )
    return open_regular_file(target)


class OpenedFolder:
    """A folder whose files are opened from the folder that had the name `path` when this was made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        if _BY_FOLDER:
            try:
                self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            except OSError as error:
                raise BundleError(f"{path} cannot be read: {error.strerror}") from error

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def names(self) -> set[str]:
        """The names of all that is in the folder."""
        return set(os.listdir(self.path if self._descriptor is None else self._descriptor))

    def open(self, name: str) -> OpenedFile:
        """Open one of its files; raises BundleError if it is not a regular file."""
        return open_regular_file(self.path / name, self._descriptor)

    @property
    def was_replaced(self) -> bool:
        """Whether the path leads to another folder by now, or to none; never known where folders are opened by name."""
        if self._descriptor is None:
            return False
        try:
            now = os.stat(self.path)
        except OSError:
            return True
        return not os.path.samestat(os.fstat(self._descriptor), now)
