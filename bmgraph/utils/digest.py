"""SHA-256 of tensors, models, batches and options: the same contents give the same digest in any process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from bmgraph.errors import ResourceError
from bmgraph.utils.stored_tensor import byte_blocks, in_memory, is_too_large, source_of

SAMPLED = 1024
"""About how many elements of each tensor a fingerprint reads (fewer than twice as many in its first version)."""

_BLOCKS = 8
"""In how many blocks, evenly spaced, they lie."""

_VERSION = "2:"
"""Begins what is computed in the second way; what the first way computed, in files of early versions, has no beginning."""


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Cheap identity of weights, from their names, dtypes, shapes and about SAMPLED elements of each.

    Empty if a tensor has no data (meta device). This is not a checksum: other elements are not read. The text holds one
    sha256 of elements in contiguous blocks and, where the values may be in memory, one of evenly spaced elements, as in
    files of early versions: `same_fingerprint` compares both kinds.
    """
    if any(tensor.device.type == "meta" for tensor in tensors.values()):
        return ""
    found = [
        _VERSION + digest({_title(name, tensor): sampled_digest(tensor) for name, tensor in tensors.items()})
    ]
    if not any(is_too_large(tensor) for tensor in tensors.values()):
        found.append(early_fingerprint(tensors))
    return ",".join(found)


def same_fingerprint(one: str, other: str) -> bool | None:
    """Whether two fingerprints are those of the same weights; None if they were computed in different ways, or one is
    empty."""
    mine, theirs = (
        {text.startswith(_VERSION): text for text in item.split(",") if text} for item in (one, other)
    )
    common = mine.keys() & theirs.keys()
    return mine[max(common)] == theirs[max(common)] if common else None


def _title(name: str, tensor: torch.Tensor) -> str:
    return f"{name} {list(tensor.shape)}"


def early_fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """The first version of a fingerprint, which adapters and programs of early versions hold: evenly spaced elements."""
    sampled = {}
    for name, tensor in tensors.items():
        source = source_of(tensor)
        flat = (tensor if source is None else source.read()).detach().reshape(-1)
        sampled[_title(name, tensor)] = flat[:: max(1, len(flat) // SAMPLED)].clone()
    return digest(sampled)


def sampled_digest(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's dtype and of its elements in _BLOCKS evenly spaced blocks; all of them, if they are few."""
    state = hashlib.sha256(f"{tensor.dtype}".encode())
    source, count = source_of(tensor), tensor.numel()
    flat = None if source is not None else in_memory(tensor).detach().reshape(-1)
    length = SAMPLED // _BLOCKS
    starts = [index * (count - length) // (_BLOCKS - 1) for index in range(_BLOCKS)]
    spans = [(start, start + length) for start in starts] if count > SAMPLED else [(0, count)]
    for begin, end in spans:
        if source is not None:
            state.update(source.sample(begin * tensor.element_size(), end * tensor.element_size()))
        elif flat is not None:
            for block in byte_blocks(flat[begin:end]):
                state.update(block)
    return state.hexdigest()


def content_digest(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's bytes, row by row; that of its file where its values are in one."""
    source = source_of(tensor)
    if source is not None:
        return source.digest
    state = hashlib.sha256()
    for block in byte_blocks(tensor):
        state.update(block)
    return state.hexdigest()


def weights_digest(tensors: Mapping[str, torch.Tensor], known: Mapping[str, str] | None = None) -> str:
    """The identity of tensors by name: of their names, dtypes, shapes and contents; `known` are their `content_digest`s.

    Files of early versions hold the `digest` of the tensors instead: `same_weights` compares both.
    """
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        contents = (known or {}).get(name) or content_digest(tensor)
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)} {contents}\n".encode())
    return _VERSION + state.hexdigest()


class HasTensors(Protocol):
    """A program, as far as its weights are digested."""

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """Parameters by name."""

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """Buffers by name."""


def same_weights(recorded: object, program: HasTensors) -> bool:
    """Whether a digest that a file holds, of either kind, is that of a program's tensors."""
    if isinstance(recorded, str) and recorded.startswith(_VERSION):
        return recorded == weights_digest({**program.parameters, **program.buffers})
    return recorded == digest(program)


def digest(value: object) -> str:
    """sha256 of a tensor, module, program, engine, number, string, path, dataclass, or mapping or sequence of these.

    The digest of a program covers only its tensors, that of an engine its backend and weights. Raises ResourceError for
    a value of another type.
    """
    state = hashlib.sha256()
    _update(state, value)
    return state.hexdigest()


def _update(state: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        state.update(f"tensor {value.dtype} {list(value.shape)} ".encode())
        if value.device.type != "meta":
            for block in byte_blocks(value):
                state.update(block)
    elif isinstance(value, nn.Module):
        _update(state, dict(value.state_dict()))
    elif hasattr(value, "parameters") and hasattr(value, "buffers") and hasattr(value, "graphs"):
        _update(state, {**value.parameters, **value.buffers})
    elif isinstance(value, Mapping):
        state.update(f"mapping {len(value)} ".encode())
        for key in sorted(value, key=str):
            state.update(f"{key} ".encode())
            _update(state, value[key])
    elif isinstance(value, os.PathLike):
        _update(state, os.fspath(value))
    elif isinstance(value, (str, int, float, bool, type(None))):
        state.update(json.dumps(value).encode())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        _update(state, {"class": type(value).__name__, **{name: getattr(value, name) for name in names}})
    elif hasattr(value, "report") and hasattr(value.report, "weights"):
        _update(state, {"engine": value.report.backend, "weights": value.report.weights})
    elif isinstance(value, (list, tuple)):
        state.update(f"sequence {len(value)} ".encode())
        for item in value:
            _update(state, item)
    else:
        raise ResourceError(
            f"a {type(value).__name__} has no digest: give tensors, models, or mappings and lists of them"
        )


def contents_digest(value: object) -> str:
    """The `digest` of a value or, where it is the path of a file or a folder, of the names and bytes of its files."""
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else b""
    if not isinstance(path, str) or not os.path.exists(path):
        return digest(value)
    state = hashlib.sha256()
    found = [(folder, name) for folder, _, names in os.walk(path) for name in names]
    for folder, name in sorted(found) if os.path.isdir(path) else [("", path)]:
        with open(os.path.join(folder, name), "rb") as stream:
            state.update(f"{folder}/{name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return state.hexdigest()


class DigestedBatches:
    """Iterates over batches and digests the ones that the consumer takes, in order."""

    def __init__(self, batches: Iterable[object]) -> None:
        self._batches = batches
        self._state = hashlib.sha256()
        self.count = 0

    def __iter__(self) -> Iterator[object]:
        for batch in self._batches:
            self._state.update(digest(batch).encode())
            self.count += 1
            yield batch

    @property
    def digest(self) -> str:
        """The digest of all batches taken so far."""
        return self._state.hexdigest()
