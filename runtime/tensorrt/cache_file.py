"""Files in a folder of the user's in which TensorRT keeps what it measured or compiled, from one process to the next."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from bmgraph.errors import InputError
from bmgraph.serialize.aside import folder_aside, remove_left_behind
from bmgraph.serialize.bundle import flush

MAGIC = b"bmgraph tensorrt cache 1\n"
_HASH = hashlib.sha256().digest_size

TIMING, KERNELS = "timing", "kernels"
"""What a file holds: the times of kernels that the builder tried, or kernels that were compiled at calls."""


def cache_folder(path: str | Path) -> Path:
    """The folder, which is made if it is not there; raises InputError if that cannot be done."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cache={str(path)!r} is no folder that can be made: {error.strerror}") from error
    return folder


class CacheFile:
    """One file of a cache's folder: `kind` of contents, `owner`, in words, whose they are, such as a library with its version and a GPU.

    A file that is not whole, or that something else made, is not used: `note` says so, and the next `write` replaces it. Contents are
    given to TensorRT as they are, so the folder is its user's own.
    """

    def __init__(self, folder: Path, kind: str, owner: str) -> None:
        self._owner = hashlib.sha256(f"{kind}\n{owner}".encode()).digest()
        self.path = folder / f"{kind}-{self._owner.hex()[:16]}.bin"
        self.note = ""
        self._held = b""

    def read(self) -> bytes:
        """The contents; empty if there are none that can be used."""
        try:
            found = self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            self.ignore(str(error.strerror))
            return b""
        size = len(MAGIC)
        title, digest, data = (
            found[: size + _HASH],
            found[size + _HASH : size + 2 * _HASH],
            found[size + 2 * _HASH :],
        )
        if title != MAGIC + self._owner or hashlib.sha256(data).digest() != digest:
            self.ignore("it is not what was written there")
            return b""
        self._held = data
        return data

    def ignore(self, reason: str) -> None:
        """Say in `note` why the contents are not used."""
        self.note = f"the cache {self.path} is not used: {reason}"

    def write(self, data: bytes) -> None:
        """Replace the contents, if they are others, whole or not at all; what does not work is said in `note`."""
        if data == self._held:
            return
        try:
            with folder_aside(self.path) as aside:
                made = aside / "contents"
                made.write_bytes(MAGIC + self._owner + hashlib.sha256(data).digest() + data)
                flush(made)
                os.replace(made, self.path)
            remove_left_behind(self.path)
        except OSError as error:
            self.note = f"the cache {self.path} could not be written: {error.strerror}"
            return
        self._held = data
