"""SHA-256 of tensors, models, batches and options: the same contents give the same digest in any process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from bmgraph.errors import ResourceError

SAMPLED = 1024
"""About how many elements of each tensor a fingerprint reads (fewer than twice as many)."""


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Cheap identity of weights: sha256 of their names, dtypes, shapes and about SAMPLED evenly spaced elements each.

    Empty if a tensor has no data (meta device). This is not a checksum: elements between the samples are not read.
    """
    if any(tensor.device.type == "meta" for tensor in tensors.values()):
        return ""
    sampled = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().reshape(-1)
        sampled[f"{name} {list(tensor.shape)}"] = flat[:: max(1, len(flat) // SAMPLED)].clone()
    return digest(sampled)


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
            flat = value.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                state.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, nn.Module):
        _update(state, dict(value.state_dict()))
    elif hasattr(value, "parameters") and hasattr(value, "buffers") and hasattr(value, "graphs"):
        encoder = getattr(value, "encoder", None)
        encoder_tensors = encoder.tensors() if encoder is not None else {}
        _update(state, {**encoder_tensors, **value.parameters, **value.buffers})
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
