"""Reads and writes safetensors files; the header is validated before any tensor is read."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch

from bmgraph.errors import BundleError
from bmgraph.serialize.aside import folder_aside, remove_left_behind
from bmgraph.serialize.bundle import parse_json
from bmgraph.serialize.opened import OpenedFile, open_regular_file
from bmgraph.utils.element_count import element_count
from bmgraph.utils.stored_tensor import byte_blocks

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip

NAMES = {dtype: name for name, dtype in DTYPES.items()}

LARGEST_HEADER = 64 * 2**20

MOST_AXES = 64
"""How many axes a tensor of a file may have; torch's own operators take no more."""


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Write tensors by name, whole or not at all; a regular file of that name is replaced. Returns the sha256 of each.

    Raises BundleError for a tensor without data or with an unsupported dtype, and if something else has the name.
    """
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise BundleError(
                f"tensor {name!r} is on the meta device and has no data to save: load the weights first"
            )
        if tensor.dtype not in DTYPES.values():
            raise BundleError(
                f"tensor {name!r} has dtype {tensor.dtype}: expected one of {', '.join(DTYPES)}"
            )
    file = file.resolve()
    if file.exists() and not file.is_file():
        raise BundleError(f"cannot write {file}: it is not a regular file; choose another name")
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered.items()}
    with folder_aside(file) as aside:
        digests = stream_tensors(aside / "tensors", entries, ordered.values())
        os.replace(aside / "tensors", file)
    remove_left_behind(file)
    return digests


def stream_tensors(
    file: Path,
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Write tensors one at a time as the iterable yields them; `entries` gives dtypes and shapes in the same order, `metadata`
    texts for the header.

    Returns the sha256 of each. What a file holds is copied a block at a time.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    digests: dict[str, str] = {}
    end = 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in zip(entries, tensors, strict=True):
            state = hashlib.sha256()
            for block in byte_blocks(tensor):
                state.update(block)
                stream.write(block)
            digests[name] = state.hexdigest()
    return digests


@dataclass(frozen=True)
class TensorsOfFile:
    """The tensors of a file, read one at a time."""

    file: OpenedFile
    _entries: Mapping[str, Entry]

    @property
    def names(self) -> Iterable[str]:
        """The names of all of them."""
        return self._entries.keys()

    def in_order(self) -> list[str]:
        """Their names in the order of the file, in which each part of it is read once."""
        return sorted(self._entries, key=lambda name: (self._entries[name].begin, self._entries[name].end))

    def read(self, name: str) -> torch.Tensor:
        """One tensor; raises BundleError for an unknown name, and for bytes that are not those that were checked."""
        if name not in self._entries:
            raise BundleError(f"{self.file.path} has no tensor {name!r}")
        entry = self._entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if tensor.numel():
            self.file.part(entry.begin, tensor.reshape(-1).view(torch.uint8).numpy().data)
        return tensor


@contextmanager
def open_tensors(file: Path | OpenedFile) -> Iterator[TensorsOfFile]:
    """The tensors of a file, to be read one at a time; raises BundleError for an invalid file.

    Raises it at the end too, if the file was written to meanwhile: nothing that was read may be used before.
    """
    opened = open_regular_file(file) if isinstance(file, Path) else file
    yield TensorsOfFile(opened, read_header(opened))
    opened.check_unwritten()


def read_tensors(file: Path | OpenedFile) -> dict[str, torch.Tensor]:
    """All tensors of a file by name; raises BundleError for a header that does not fit the file.

    The bytes of the tensors are those that are compared with the checksum of a bundle's file, even if it is overwritten.
    """
    with open_tensors(file) as stored:
        found = {name: stored.read(name) for name in stored.in_order()}
        return {name: found[name] for name in stored.names}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: `begin` is the place of its first byte in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: OpenedFile) -> dict[str, Entry]:
    """The tensors of a file by name; raises BundleError unless they fill the file without overlap."""
    where, size = file.path, file.status.st_size
    if size < 8:
        raise BundleError(f"{where} is truncated")
    prefix = bytearray(8)
    file.part(0, memoryview(prefix))
    length = struct.unpack("<Q", prefix)[0]
    if length > min(LARGEST_HEADER, size - 8):
        raise BundleError(
            f"{where} claims a header of {length} bytes: that exceeds the file or {LARGEST_HEADER // 2**20} MiB"
        )
    text = bytearray(length)
    file.part(8, memoryview(text))
    try:
        header = parse_json(bytes(text))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where} has an unreadable header") from error
    if not isinstance(header, dict):
        raise BundleError(f"{where} has an unreadable header")
    start = 8 + length
    entries = {
        name: _entry(where, name, entry, start, size)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    spans = sorted((entry.begin, entry.end) for entry in entries.values())
    if sum(end - begin for begin, end in spans) != size - start:
        raise BundleError(f"{where} holds bytes that belong to no tensor, or tensors that overlap")
    if any(earlier[1] > later[0] for earlier, later in pairwise(spans)):
        raise BundleError(f"{where} holds tensors that overlap")
    return entries


def _entry(where: Path, name: str, entry: Any, start: int, size: int) -> Entry:
    """One entry of a header; raises BundleError unless it lies in the file and has the size that its shape says."""
    try:
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        valid = (
            isinstance(shape, list)
            and len(shape) <= MOST_AXES
            and all(type(item) is int and 0 <= item < 2**63 for item in (*shape, begin, end))
            and element_count(max(1, item) for item in shape) < 2**63
            and end - begin == element_count(shape) * dtype.itemsize
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{where} has an invalid header entry for tensor {name!r}") from error
    if not valid or end > size - start:
        raise BundleError(f"{where} gives tensor {name!r} a size that differs from its data")
    return Entry(dtype, tuple(shape), start + begin, start + end)
