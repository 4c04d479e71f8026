"""Tensors that stay in their safetensors file: read when asked, and compared with the bytes that were checked before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from bmgraph.errors import BundleError
from bmgraph.serialize.opened import OpenedFile
from bmgraph.serialize.safetensors_io import Entry, read_header
from bmgraph.utils.finite import is_finite
from bmgraph.utils.memory_budget import memory_budget
from bmgraph.utils.stored_tensor import BLOCK, Source, StoredTensor

SMALL = 64 * 2**10
"""Tensors of at most so many bytes are read at once."""


class FileTensor(Source):
    """A tensor of an opened file. `path` names the file from outside; `name` is the tensor's name in it.

    What is read must be what was hashed when the file was checked, if it was; and have the sha256 `digest`, if that is
    known. Else the first read gives the digest, and until then nothing may have been written to the file since it was
    opened.
    """

    def __init__(
        self, file: OpenedFile, path: Path, name: str, entry: Entry, resident: bool, digest: str = ""
    ) -> None:
        self.file, self.path, self.name = file, path, name
        self.shape, self.dtype, self.resident = entry.shape, entry.dtype, resident
        self._begin, self._digest, self._told = entry.begin, digest, bool(digest)
        self._finite = None if entry.dtype.is_floating_point else True

    def blocks(self, into: memoryview | None = None, size: int = BLOCK) -> Iterator[memoryview]:
        """The bytes in order; what is not compared block by block is compared with the digest after the last one."""
        if self.file.expected and not self._digest:
            yield from self._pieces(into, size)
            return
        state = hashlib.sha256()
        for piece in self._pieces(into, size):
            state.update(piece)
            yield piece
        self._compare(state.hexdigest())

    def _pieces(self, into: memoryview | None, size: int) -> Iterator[memoryview]:
        total = self.bytes
        buffer = memoryview(bytearray(min(size, total))) if into is None else into
        for begin in range(0, total, size):
            count = min(size, total - begin)
            start = 0 if into is None else begin
            piece = buffer[start : start + count]
            self.file.part(self._begin + begin, piece)
            yield piece

    def sample(self, begin: int, end: int) -> bytes:
        """Some of the bytes; raises BundleError if the file was written to since it was opened."""
        data = bytearray(end - begin)
        self.file.part(self._begin + begin, memoryview(data))
        if not self._digest:
            self.file.check_unwritten()
        return bytes(data)

    def fill(self, into: memoryview, begin: int, pages: memoryview | None = None) -> None:
        """Read the bytes from `begin` on into a buffer; of a tensor that must have a digest all bytes are read, to compare it."""
        if self.read_whole:
            first = 0
            for piece in self.blocks():
                low, high = max(begin, first), min(begin + len(into), first + len(piece))
                if low < high:
                    into[low - begin : high - begin] = piece[low - first : high - first]
                first += len(piece)
            return
        for low in range(0, len(into), BLOCK):
            self.file.part(self._begin + begin + low, into[low : low + BLOCK], pages)
        self.file.check_unwritten()

    @property
    def read_whole(self) -> bool:
        """Whether there is a digest to compare, and no hash of each block."""
        return self._told and not self.file.expected

    @property
    def offset(self) -> int:
        """The place of the first byte in the file."""
        return self._begin

    def bypass_cache(self) -> str:
        """Open the file for it; one whose tensors are read whole stays as it is."""
        return "whole tensors are compared with their sha256" if self.read_whole else self.file.bypass_cache()

    def will_fill(self, begin: int, end: int) -> None:
        """Let the system begin to read."""
        self.file.will_read(self._begin + begin, self._begin + end)

    @property
    def digest(self) -> str:
        """sha256 of all bytes."""
        if not self._digest:
            state = hashlib.sha256()
            finite = True
            for piece in self._pieces(None, BLOCK):
                state.update(piece)
                finite = finite and _piece_is_finite(piece, self.dtype)
            self._compare(state.hexdigest())
            self._finite = finite
            self._release()
        return self._digest

    @property
    def finite(self) -> bool | None:
        """Whether no value is NaN or infinite; known once `digest` or `scan` have read them."""
        return self._finite

    def scan(self) -> None:
        """Read all bytes, a block at a time, to know whether they are finite."""
        if self._finite is None:
            self._finite = all(_piece_is_finite(piece, self.dtype) for piece in self.blocks())
            self._release()

    def _release(self) -> None:
        if not self.resident:
            self.file.release(self._begin, self._begin + self.bytes)

    def _compare(self, found: str) -> None:
        if not self._digest:
            self.file.check_unwritten()
            self._digest = found
        elif found != self._digest:
            raise BundleError(f"tensor {self.name!r}: {self.file.changed()}")


def _piece_is_finite(piece: memoryview, dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point or is_finite(torch.frombuffer(piece, dtype=torch.uint8).view(dtype))


def stored_tensors(
    file: OpenedFile, path: Path, resident: bool, digests: Mapping[str, str] | None = None
) -> dict[str, StoredTensor]:
    """The tensors of a file by name, none of them read; `digests` are the sha256 that they must have, where known.

    Raises BundleError for a header that does not fit the file.
    """
    known = digests or {}
    return {
        name: StoredTensor(FileTensor(file, path, name, entry, resident, known.get(name, "")))
        for name, entry in read_header(file).items()
    }


def scanned_tensors(file: OpenedFile) -> dict[str, torch.Tensor]:
    """The tensors of a bundle's checked file by name; those above SMALL stay in the file.

    A file that is overwritten later is found out when it is read: every block must be the one that was hashed. One that
    is replaced or removed changes nothing, since it stays open. Raises BundleError for an invalid or altered file.
    """
    entries = read_header(file)
    sizes = [entry.end - entry.begin for entry in entries.values()]
    resident = max(sizes, default=0) <= SMALL or sum(sizes) <= memory_budget()
    found: dict[str, torch.Tensor] = {}
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        source = FileTensor(file, file.path.absolute(), name, entry, resident)
        if source.bytes > SMALL:
            source.scan()
        found[name] = source.read() if source.bytes <= SMALL else StoredTensor(source)
    return {name: found[name] for name in entries}
