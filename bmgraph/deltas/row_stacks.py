"""Deltas of several rows as stacks [deltas + 1, ...], and what each row chose of them, with axes that fit the row's values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def stacked_entries(
    entries: Mapping[int, Mapping[str, torch.Tensor]], count: int, fill: float = 0.0
) -> dict[str, torch.Tensor]:
    """Tensors [count + 1, ...] of `fill`, in which item n begins with `entries[n]`: the sizes are those of the largest."""
    found = {}
    for key, first in next(iter(entries.values())).items():
        own = {number: entry[key] for number, entry in entries.items()}
        sizes = [max(tensor.shape[axis] for tensor in own.values()) for axis in range(first.dim())]
        dtype = torch.float32
        for tensor in own.values():
            dtype = torch.promote_types(dtype, tensor.dtype)
        stack = torch.full((count + 1, *sizes), fill, dtype=dtype, device=first.device)
        for number, tensor in own.items():
            stack[corner(number, tensor.shape)] = tensor
        found[key] = stack
    return found


def corner(number: int, sizes: Iterable[int]) -> tuple[int | slice, ...]:
    """The index of the beginning of item `number` of a stack, of so many entries along each axis."""
    return (number, *(slice(size) for size in sizes))


def axes_of(value: fx.Node) -> int:
    """The number of axes of a node's value."""
    return len(value.meta["val"].shape)


def row_matrix(call: Any, matrix: fx.Node, axes: int) -> fx.Node:
    """A matrix of each row [rows, in, out] as a factor of values [rows, ..., in] with so many axes, three or more."""
    for _ in range(axes - 3):
        matrix = call(aten.unsqueeze.default, matrix, 1)
    return matrix


def row_vector(call: Any, vector: fx.Node, axes: int) -> fx.Node:
    """A vector of each row [rows, out] beside values [rows, ..., out] with so many axes, two or more."""
    for _ in range(axes - 2):
        vector = call(aten.unsqueeze.default, vector, 1)
    return vector
