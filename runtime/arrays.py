"""Checked batches as numpy arrays, which engines of ONNX models take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from bmgraph.errors import InputError
from bmgraph.runtime.generation.sampling import Array

if TYPE_CHECKING:
    from bmgraph.runtime.engine_base import Engine


def feeds_of(engine: Engine, batch: Mapping[str, object]) -> dict[str, Array]:
    """Check a batch and convert it to arrays by name, in the order of the engine's inputs; raises InputError."""
    return {name: _to_numpy(value) for name, value in engine.checked(batch).items()}


def shapes_text(feeds: Mapping[str, Array]) -> str:
    """The shapes of arrays by name, for errors."""
    return ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())


def _to_numpy(value: torch.Tensor) -> Array:
    if value.dtype is torch.bfloat16:
        raise InputError("an engine takes no bfloat16 inputs: convert them to float32")
    array: Array = value.detach().cpu().contiguous().numpy()
    return array
