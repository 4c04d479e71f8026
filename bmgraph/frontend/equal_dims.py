"""Shapes for torch.export in which axes of equal size share one named dimension, within the bounds that it suggests."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from functools import reduce
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


def tie_equal_dims(exported: torch.export.ExportedProgram, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Make one dimension of all sizes that are equal in the example, if the trace is then valid for all sizes that it is
    valid for now: each guard on several of them must follow from their being equal.

    Returns whether the exported program was changed.
    """
    found: dict[int, dict[Any, torch.SymInt]] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in tensors:
            for size, known in zip(node.meta["val"].shape, tensors[node.name].shape):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    found.setdefault(known, {}).setdefault(size.node.expr, size)
    groups = [list(sizes.values()) for sizes in found.values() if len(sizes) > 1]
    if not groups:
        return False
    environment = groups[0][0].node.shape_env
    tied = {size.node.expr: sizes[0].node.expr for sizes in groups for size in sizes}
    for guard in environment.guards:
        now = environment.replace(guard.expr)
        is_between = len(tied.keys() & now.free_symbols) > 1
        if is_between and now.xreplace(tied) != True:  # noqa: E712  (sympy's true is not a bool)
            return False
    ranges = exported.range_constraints
    for sizes in groups:
        symbols = [size.node.expr for size in sizes]
        bounds = [ranges[symbol] for symbol in symbols if symbol in ranges]
        for symbol in symbols:
            if bounds:
                ranges[symbol] = reduce(operator.and_, bounds)
        for size in sizes[1:]:
            assert sizes[0] == size  # asking ties them
    return True


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
