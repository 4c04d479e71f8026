"""Nested plain values (numbers, texts, lists, tuples, dicts, bytes, small tensors) as JSON, and back without trust."""

from __future__ import annotations

import base64
import binascii
from math import isfinite, prod
from typing import Any

import numpy as np
import torch

from bmgraph.errors import BundleError, InputError
from bmgraph.ir.tensor_spec import DTYPE_NAMES

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
TUPLE, DICT, BYTES, TENSOR, ARRAY, NUMBER = "$tuple", "$dict", "$bytes", "$tensor", "$array", "$number"


def plain_json(value: object, where: str) -> Any:
    """A value as JSON. Raises InputError, naming `where` in it, for what is none of the plain kinds."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else {NUMBER: repr(value)}
    if isinstance(value, (list, tuple)):
        items = [plain_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else {TUPLE: items}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: plain_json(item, f"{where}[{key!r}]") for key, item in value.items()}
        pairs = [
            [plain_json(key, where), plain_json(item, f"{where}[{key!r}]")] for key, item in value.items()
        ]
        return {DICT: pairs}
    if isinstance(value, (bytes, bytearray)):
        return {BYTES: _text(bytes(value))}
    if isinstance(value, torch.Tensor) and value.dtype in DTYPE_NAMES:
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return {TENSOR: [DTYPE_NAMES[value.dtype], list(value.shape), _text(flat.numpy().tobytes())]}
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf":
        return {ARRAY: [value.dtype.str, list(value.shape), _text(np.ascontiguousarray(value).tobytes())]}
    raise InputError(f"{where} is a {type(value).__name__}, which cannot be saved as plain data")


def from_plain_json(found: Any, where: str) -> Any:
    """The value of what `plain_json` gave. Raises BundleError, naming `where`, for anything else."""
    if isinstance(found, list):
        return [from_plain_json(item, where) for item in found]
    if not isinstance(found, dict):
        return found
    tag = next(iter(found), "")
    if not tag.startswith("$"):
        return {key: from_plain_json(item, where) for key, item in found.items()}
    try:
        return _tagged(tag, found[tag], where)
    except (TypeError, ValueError, KeyError, RuntimeError, binascii.Error) as error:
        raise BundleError(f"{where} holds a {tag} that is not valid: it was altered") from error


def _tagged(tag: str, item: Any, where: str) -> Any:
    if tag == TUPLE:
        return tuple(from_plain_json(one, where) for one in item)
    if tag == DICT:
        return {from_plain_json(key, where): from_plain_json(one, where) for key, one in item}
    if tag == BYTES:
        return base64.b64decode(item, validate=True)
    if tag == NUMBER:
        return {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}[item]
    if tag not in (TENSOR, ARRAY):
        raise BundleError(f"{where} holds {tag!r}, which is no kind of value: it was altered")
    name, shape, text = item
    data = base64.b64decode(text, validate=True)
    if tag == ARRAY:
        dtype = np.dtype(name)
        if dtype.kind not in "biuf":
            raise ValueError(name)
        array = np.frombuffer(data, dtype).reshape(shape).copy()
        return array if shape else array[()]
    kind = _DTYPES[name]
    if len(data) != prod(shape) * kind.itemsize:
        raise ValueError(shape)
    return (
        torch.frombuffer(bytearray(data), dtype=kind).reshape(shape)
        if data
        else torch.empty(shape, dtype=kind)
    )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
