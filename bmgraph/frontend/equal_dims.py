"""Shapes for torch.export in which axes of equal size share one named dimension, within the bounds that it suggests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import Dim

Shapes = dict[str, dict[int, Any]]
"""By input and axis: a named dimension, or `Dim.AUTO`."""

_BOUNDS = re.compile(r"^\s*(\w+) = Dim\('\w+'(?:, min=(\d+))?(?:, max=(\d+))?\)\s*$", re.MULTILINE)
"""A line of an error of torch.export that suggests bounds for a named dimension."""


def name_equal_dims(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    """One named dimension for each size that occurs twice or more, `Dim.AUTO` for the others; empty if all differ."""
    sizes = [size for tensor in tensors.values() for size in tensor.shape]
    named = {size: Dim(f"size_{size}") for size in sizes if sizes.count(size) > 1}
    if not named:
        return {}
    return {
        name: {axis: named.get(size, Dim.AUTO) for axis, size in enumerate(tensor.shape)}
        for name, tensor in tensors.items()
    }


def with_suggested_bounds(shapes: Shapes, message: str) -> Shapes:
    """The shapes with the bounds that an error of torch.export suggests; empty if it suggests no new ones.

    Unlike `Dim.AUTO`, a named dimension must declare its bounds: a table of position embeddings limits the length.
    """
    suggested = {
        name: Dim(name, min=int(low) if low else None, max=int(high) if high else None)
        for name, low, high in _BOUNDS.findall(message)
    }
    bounded = {
        name: {axis: suggested.get(getattr(size, "__name__", ""), size) for axis, size in axes.items()}
        for name, axes in shapes.items()
    }
    return bounded if _bounds(bounded) != _bounds(shapes) else {}


def _bounds(shapes: Shapes) -> dict[str, tuple[int, int]]:
    named = [size for axes in shapes.values() for size in axes.values() if size is not Dim.AUTO]
    return {size.__name__: (size.min, size.max) for size in named}
