"""Reads and writes safetensors files; the header is validated before any tensor is read."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch

from bmgraph.errors import BundleError
from bmgraph.serialize.bundle import open_regular_file, parse_json

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

NAMES = {dtype: name for name, dtype in DTYPES.items()}

LARGEST_HEADER = 64 * 2**20


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors by name; raises BundleError for a tensor without data or with an unsupported dtype."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise BundleError(
                f"tensor {name!r} is on the meta device and has no data to save: load the weights first"
            )
        if tensor.dtype not in DTYPES.values():
            raise BundleError(
                f"tensor {name!r} has dtype {tensor.dtype}: expected one of {', '.join(DTYPES)}"
            )
    try:
        save_file(
            {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, str(file)
        )
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise BundleError(f"cannot write {file.name!r}: {error}") from error
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(file)) from error


def stream_tensors(
    file: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[torch.Tensor]
) -> None:
    """Write tensors one at a time as the iterable yields them; `entries` gives dtypes and shapes in the same order."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                stream.write(flat.view(torch.uint8).numpy().data)


@contextmanager
def open_tensors(file: Path) -> Iterator[Callable[[str], torch.Tensor]]:
    """A function that reads one tensor of a file by name; raises BundleError for an invalid file or unknown name."""
    from safetensors import SafetensorError, safe_open

    _check_header(file)
    try:
        with safe_open(str(file), framework="pt") as opened:
            names = set(opened.keys())

            def read(name: str) -> torch.Tensor:
                if name not in names:
                    raise BundleError(f"{file} has no tensor {name!r}")
                return opened.get_tensor(name)  # type: ignore[no-any-return]

            yield read
    except SafetensorError as error:
        raise BundleError(f"{file} is not a valid safetensors file: {error}") from error


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file by name; raises BundleError for a header that does not fit the file."""
    from safetensors import SafetensorError, safe_open

    _check_header(file)
    try:
        with safe_open(str(file), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise BundleError(f"{file} is not a valid safetensors file: {error}") from error


def _check_header(file: Path) -> None:
    with open_regular_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise BundleError(f"{file} is truncated")
        length = struct.unpack("<Q", prefix)[0]
        if length > min(LARGEST_HEADER, size - 8):
            raise BundleError(
                f"{file} claims a header of {length} bytes: that exceeds the file or {LARGEST_HEADER // 2**20} MiB"
            )
        try:
            header = parse_json(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{file} has an unreadable header") from error
    if not isinstance(header, dict):
        raise BundleError(f"{file} has an unreadable header")
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            expected = prod(shape) * dtype.itemsize
            valid = (
                all(type(item) is int and item >= 0 for item in (*shape, begin, end))
                and end - begin == expected
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{file} has an invalid header entry for tensor {name!r}") from error
        if not valid or end > size - 8 - length:
            raise BundleError(f"{file} gives tensor {name!r} a size that differs from its data")
        spans.append((begin, end))
    spans.sort()
    if sum(end - begin for begin, end in spans) != size - 8 - length:
        raise BundleError(f"{file} holds bytes that belong to no tensor, or tensors that overlap")
    if any(earlier[1] > later[0] for earlier, later in pairwise(spans)):
        raise BundleError(f"{file} holds tensors that overlap")
