"""Folders and files that are opened once, so that what was checked is what is read.

A folder may be saved anew under its name while it is read: its path then leads to other files. What was opened stays what
it was, even after its name has gone.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from bmgraph.errors import BundleError
from bmgraph.serialize.direct_reads import DirectReads, open_direct

_BY_FOLDER = os.open in os.supports_dir_fd and os.stat in os.supports_dir_fd and os.scandir in os.supports_fd
"""Whether this system opens files by an opened folder instead of its name (Windows does not)."""


_BLOCK = 2**20
PART_PAGES = _BLOCK
"""Bytes that `OpenedFile.part` reads at a time past the page cache; reads that end where a multiple of it begins share no page."""
_AT_POSITION = hasattr(os, "preadv")
"""Whether this system reads at a position, so that threads and forked processes can read one opened file at a time."""


class _Positioned(io.RawIOBase):
    """Reads an opened file at a position of its own, and leaves it open."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._position = descriptor, 0

    def readable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; from the end, by the size that the file has now."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: os.fstat(self._descriptor).st_size}
        self._position = max(0, base[whence] + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read into a buffer; returns how many bytes, 0 at the end."""
        count = os.preadv(self._descriptor, [buffer], self._position)
        self._position += count
        return count


class OpenedFile:
    """A regular file, opened for reading; closed with its last reference. `path` is its name in errors.

    `expected` is the sha256 that its contents must have, "" before it is known; `kind` is what its folder is, for errors.
    Whoever overwrites the file in place changes what is read here too, so whoever reads compares the very bytes that it
    uses (`read`, `copy_to`, `compare`, `part`), each time.
    """

    def __init__(self, path: Path, descriptor: int, kind: str = "bundle") -> None:
        self.path, self.kind = path, kind
        self.expected = ""
        self._prefixes: list[Any] = []
        self._last: tuple[int, bytes] = -1, b""
        self._direct: DirectReads | None = None
        self._descriptor = descriptor
        self._began = _written(self.status)

    def __del__(self) -> None:
        os.close(self._descriptor)

    @property
    def status(self) -> os.stat_result:
        """The status of the opened file."""
        return os.fstat(self._descriptor)

    @contextmanager
    def stream(self) -> Iterator[BinaryIO]:
        """The file's bytes from the first on, with a position of its own where the system can read at a position."""
        if _AT_POSITION:
            with io.BufferedReader(_Positioned(self._descriptor)) as stream:
                yield stream  # type: ignore[misc]  # what BinaryIO adds is not used
            return
        with os.fdopen(os.dup(self._descriptor), "rb") as shared:
            shared.seek(0)
            yield shared

    def release(self, begin: int, end: int) -> None:
        """Let the system drop its copies of these bytes, where it can: they are not read again soon."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def will_read(self, begin: int, end: int) -> None:
        """Let the system begin to read these bytes, where it can: they are asked for soon."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def bypass_cache(self) -> str:
        """From now on let `part` read past the system's page cache where it is given pages; "", or why that cannot be done."""
        if self._direct is None:
            opened = open_direct(self._descriptor)
            if isinstance(opened, str):
                return opened
            self._direct = opened
        return ""

    def read(self) -> bytearray:
        """The contents; raises BundleError if they are not the expected ones, or are being changed."""
        size = self.status.st_size
        data = bytearray(size)
        with self.stream() as stream:
            whole = stream.readinto(data) == size and not stream.read(1)  # type: ignore[attr-defined]
        if not whole:
            raise BundleError(self.changed())
        self.compare(hashlib.sha256(data).hexdigest())
        return data

    def copy_to(self, file: Path) -> None:
        """Write the contents to a new file; raises BundleError if they are not the expected ones."""
        state = hashlib.sha256()
        with self.stream() as stream, open(file, "wb") as target:
            while block := stream.read(_BLOCK):
                state.update(block)
                target.write(block)
        self.compare(state.hexdigest())

    def sha256(self) -> str:
        """The sha256 of the contents, now."""
        return self._hashed()[-1].hexdigest()  # type: ignore[no-any-return]

    def check(self, expected: str) -> bool:
        """Whether the contents have this sha256, which all that is read later must have, too."""
        prefixes = self._hashed()
        if prefixes[-1].hexdigest() != expected:
            return False
        self.expected, self._prefixes = expected, prefixes
        return True

    def _hashed(self) -> list[Any]:
        """The hash of nothing, of the first block, of the first two, ..., and of all: one small object a block."""
        states = [hashlib.sha256()]
        with self.stream() as stream:
            while block := stream.read(_BLOCK):
                states.append(states[-1].copy())
                states[-1].update(block)
        return states

    def part(self, begin: int, into: memoryview, pages: memoryview | None = None) -> None:
        """Fill a buffer with the bytes from `begin` on.

        `pages`: PART_PAGES bytes of memory at the beginning of a page, through which reads past the page cache go after
        `bypass_cache`. Raises BundleError if the file ends before, or if a block of a checked file is not the one that was
        hashed.
        """
        direct = None if pages is None else self._direct
        while into:
            if self.expected or not _AT_POSITION:
                number, skip = divmod(begin, _BLOCK)
                found = self._block(number, direct, pages)[skip : skip + len(into)]
                count = _copy(found, into)
            elif direct is not None and pages is not None:
                count = _copy(direct.read(begin, begin + len(into), pages), into)
            else:
                count = os.preadv(self._descriptor, [into], begin)
            if count <= 0:
                raise BundleError(self.changed())
            begin, into = begin + count, into[count:]

    def _block(self, number: int, direct: DirectReads | None, pages: memoryview | None) -> bytes | memoryview:
        """A block of the file; the last one that was read by itself is kept, since neighbours are read one after the other."""
        last, kept = self._last
        if last == number:
            return kept
        begin = number * _BLOCK
        block: bytes | memoryview
        if direct is not None and pages is not None:
            block = direct.read(begin, begin + _BLOCK, pages)
        else:
            with self.stream() as stream:
                stream.seek(begin)
                block = stream.read(_BLOCK)
        if self.expected:
            if number + 1 >= len(self._prefixes):
                raise BundleError(self.changed())
            state = self._prefixes[number].copy()
            state.update(block)
            if state.digest() != self._prefixes[number + 1].digest():
                raise BundleError(self.changed())
        if isinstance(block, bytes):
            self._last = number, block
        return block

    def compare(self, found: str) -> None:
        """Raise BundleError if the sha256 of what was read is not the expected one."""
        if self.expected and found != self.expected:
            raise BundleError(self.changed())

    def check_unwritten(self) -> None:
        """Raise BundleError if a file without a checksum was written to since it was opened, as far as its status tells.

        Its owner can set the time of the last write, but not that of the last change of any kind, which counts as long as
        no name was given to the file or taken from it. (Of a checked file the bytes themselves are compared.)
        """
        now = _written(self.status)
        if self.expected:
            return
        if now[:2] != self._began[:2] or (now.links == self._began.links and now != self._began):
            raise BundleError(self.changed())

    def changed(self) -> str:
        """What to say where the contents are no longer those that were checked."""
        return (
            f"{self.path.name!r} in {self.kind} {self.path.parent} was altered after it was checked: something writes to it in "
            "place; restore it, and load it again"
        )


def _copy(found: bytes | memoryview, into: memoryview) -> int:
    """Copy bytes to the beginning of a buffer, while other threads of Python run; returns how many."""
    if found:
        np.copyto(np.frombuffer(into[: len(found)], np.uint8), np.frombuffer(found, np.uint8))
    return len(found)


class _Written(NamedTuple):
    """What a status tells of the last write: size, time of the last write and of the last change, number of names."""

    size: int
    written: int
    changed: int
    links: int


def _written(status: os.stat_result) -> _Written:
    return _Written(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_nlink)


def open_regular_file(file: Path, folder: int | None = None, kind: str = "bundle") -> OpenedFile:
    """Open a regular file, by its name in the opened `folder` if given; `kind` is what the folder is, for errors.

    Raises BundleError, without blocking, if it is missing, a link, a pipe, a folder or a device.
    """
    where = file if folder is None else Path(file.name)
    try:
        found = os.stat(where, dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        raise BundleError(f"{kind} {file.parent} lacks {file.name!r}") from error
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{file.name!r} in {kind} {file.parent} is not a regular file")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(where, flags | getattr(os, "O_BINARY", 0), dir_fd=folder)
    except OSError as error:
        raise BundleError(
            f"{file.name!r} in {kind} {file.parent} cannot be read: {error.strerror}"
        ) from error
    opened = OpenedFile(file, descriptor, kind)
    if not stat.S_ISREG(opened.status.st_mode):
        raise BundleError(f"{file.name!r} in {kind} {file.parent} is not a regular file")
    return opened


def open_user_file(file: Path, kind: str = "bundle") -> OpenedFile:
    """Open a file of a folder that the user names, which may be a link within that folder, or into Hugging Face's cache.

    In that cache, `snapshots/REVISION` holds links to files of `blobs` beside `snapshots`. Raises BundleError for a link
    that leads anywhere else, and as `open_regular_file` does.
    """
    if not file.is_symlink():
        return open_regular_file(file, kind=kind)
    target = file.resolve()
    if not (target.is_relative_to(file.parent.resolve()) or _is_cached(file)):
        raise BundleError(
            f"{file.name!r} in {file.parent} is a link to {target}, outside of its folder and of a cache's blobs: put the "
            "file itself there"
        )
    return open_regular_file(target, kind=kind)


def _is_cached(link: Path) -> bool:
    """Whether a link is one of Hugging Face's cache: in `snapshots/REVISION`, to a file of `blobs` beside `snapshots`."""
    places = [
        parent.parent / "blobs" for parent in link.parent.resolve().parents if parent.name == "snapshots"
    ]
    return any(link.resolve().is_relative_to(place) for place in places)


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
        """Open one of its files, which may be a link of Hugging Face's cache; raises BundleError if it is not a regular file."""
        link = self.path / name
        if not (link.is_symlink() and _is_cached(link)):
            return open_regular_file(link, self._descriptor)
        opened = open_regular_file(link.resolve())
        opened.path = link  # its name in errors
        return opened

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
