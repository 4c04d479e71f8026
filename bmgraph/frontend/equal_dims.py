"""Sizes that a model leaves free only where torch.export is told that they are one size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import Dim

Shapes = dict[str, dict[int, Any]]
"""By input and axis: the named size that it is, or `Dim.AUTO`."""

_BOUNDS = re.compile(r"^\s*(\w+) = Dim\('\w+'(?:, min=(\d+))?(?:, max=(\d+))?\)\s*$", re.MULTILINE)
"""A line in which torch.export says which bounds a named size needs."""


def equal_as_one(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    """The axes of inputs, those of equal sizes under one name; empty where no two sizes are equal."""
    sizes = [size for tensor in tensors.values() for size in tensor.shape]
    named = {size: Dim(f"size_{size}") for size in sizes if sizes.count(size) > 1}
    if not named:
        return {}
    return {
        name: {axis: named.get(size, Dim.AUTO) for axis, size in enumerate(tensor.shape)}
        for name, tensor in tensors.items()
    }


def within_bounds(shapes: Shapes, message: str) -> Shapes:
    """The shapes with the bounds that an error of torch.export asks for; empty where it asks for no new ones.

    A named size, other than one that is found out, must say its bounds beforehand: a table of positions has an end.
    """
    asked = {
        name: Dim(name, min=int(low) if low else None, max=int(high) if high else None)
        for name, low, high in _BOUNDS.findall(message)
    }
    bounded = {
        name: {axis: asked.get(getattr(size, "__name__", ""), size) for axis, size in axes.items()}
        for name, axes in shapes.items()
    }
    return bounded if _bounds(bounded) != _bounds(shapes) else {}


def _bounds(shapes: Shapes) -> dict[str, tuple[int, int]]:
    named = [size for axes in shapes.values() for size in axes.values() if size is not Dim.AUTO]
    return {size.__name__: (size.min, size.max) for size in named}
