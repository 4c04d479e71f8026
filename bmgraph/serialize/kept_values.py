"""Plain values with tensors in one checksummed file, written whole or not at all: what work that may be stopped has found."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bmgraph.errors import BundleError
from bmgraph.serialize.aside import folder_aside, remove_left_behind
from bmgraph.serialize.bundle import cannot_save, flush, parse_json
from bmgraph.serialize.opened import open_regular_file
from bmgraph.serialize.safetensors_io import NAMES, read_tensors, stream_tensors
from bmgraph.utils.digest import weights_digest
from bmgraph.utils.stored_tensor import source_of

VALUES, CHECKSUM = "values", "sha256"
"""The tensors of a file that hold what is no tensor, as JSON u8[n], and the sha256 u8[32] of all others."""


def write_values(file: Path, value: object) -> int:
    """Write numbers, texts, tensors, and tables, tuples and lists of these; a file of that name is replaced. Returns its bytes.

    It is on the disk, whole, when this returns. Raises BundleError for a value of another kind, and where the disk is full.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_encoded(value, tensors), allow_nan=False).encode()
    tensors[VALUES] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    tensors[CHECKSUM] = _checksum(tensors)
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered.items()}
    with cannot_save(file), folder_aside(file) as aside:
        stream_tensors(aside / "tensors", entries, ordered.values())
        flush(aside / "tensors")
        os.replace(aside / "tensors", file)
        flush(file.parent)
    remove_left_behind(file)
    return file.stat().st_size


def read_values(file: Path) -> Any:
    """What was written; raises BundleError for a file that is missing, not whole, or not what was written."""
    tensors = read_tensors(open_regular_file(file))
    known = tensors.pop(CHECKSUM, None)
    if known is None or VALUES not in tensors or not torch.equal(known, _checksum(tensors)):
        raise BundleError(f"{file} does not hold what was written: its checksum differs")
    try:
        return _decoded(parse_json(tensors.pop(VALUES).numpy().tobytes()), tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BundleError(f"{file} does not hold values: {error}") from error


def _checksum(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """sha256 u8[32] of tensors with their names, types and shapes."""
    return torch.frombuffer(
        bytearray(hashlib.sha256(weights_digest(tensors).encode()).digest()), dtype=torch.uint8
    )


def _encoded(value: object, tensors: dict[str, torch.Tensor]) -> Any:
    """A value as JSON; its tensors, in the order that they have in memory, are added to `tensors`."""
    if isinstance(value, torch.Tensor):
        return _encoded_tensor(value, tensors)
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {"table": [[_encoded(key, tensors), _encoded(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_encoded(item, tensors) for item in value]
    raise BundleError(
        f"a {type(value).__name__} cannot be kept: give numbers, texts, tensors, or tables of them"
    )


def _encoded_tensor(value: torch.Tensor, tensors: dict[str, torch.Tensor]) -> Any:
    if value.device.type == "meta" or value.dtype not in NAMES:
        raise BundleError(f"a tensor of {value.dtype} on {value.device} cannot be kept")
    name = str(len(tensors))
    if source_of(value) is not None or value.is_contiguous():
        tensors[name] = value
        return {"tensor": name}
    strides = value.stride()
    order = sorted(range(value.dim()), key=lambda axis: -strides[axis])
    tensors[name] = value.detach().permute(order).contiguous()
    return {"tensor": name, "order": order}


def _decoded(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `_encoded`."""
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        found, order = tensors[value["tensor"]], value.get("order")
        if order is None:
            return found
        if sorted(order) != list(range(found.dim())):
            raise ValueError(f"{order} is no order of {found.dim()} dimensions")
        return found.permute(sorted(range(len(order)), key=order.__getitem__))
    ((kind, content),) = value.items()
    if kind == "table":
        return {_decoded(key, tensors): _decoded(item, tensors) for key, item in content}
    if kind == "tuple":
        return tuple(_decoded(item, tensors) for item in content)
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    raise ValueError(f"{kind!r} is no kind of value")
