"""Labels that say which row of the batch an element of a value depends on.

An element carries NONE, the number of the one row that it is computed from, SUMMED (a sum over all rows, to which each
adds what depends on it alone), or MIXED.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

NONE = 0
"""Label of what depends on no row; rows are numbered from 1."""
ROWS = 3
"""Number of rows that a graph is run with."""
MIXED = 1 << 20
"""Label of what depends on several rows."""
SUMMED = MIXED - 1
"""Label of a sum over all rows of what depends on each of them alone, which ranks can add."""

Labels = torch.Tensor
"""i32 of a value's shape."""


@dataclass
class Value:
    """A value at small sizes: on meta, or computed where it is made of sizes alone; with its labels.

    `numbered`: it may depend on the number of a row, or hold some rows more often than others.
    """

    tensor: torch.Tensor
    labels: Labels
    known: bool = False
    numbered: bool = False


@dataclass(frozen=True)
class Size:
    """A size or number; whether it is made of the number of rows."""

    number: Any
    of_rows: bool


def once(labels: Labels) -> Labels:
    """Labels without their repetitions: with size 1 along the axes that they are expanded along, such as all of a weight."""
    kept = (slice(0, 1) if stride == 0 else slice(None) for stride in labels.stride())
    return labels[tuple(kept)]


def join(*labels: Labels) -> Labels:
    """The labels of elements that are computed from broadcast operands."""
    found = once(labels[0])
    for other in map(once, labels[1:]):
        same = (found == other) | (other == NONE)
        found = torch.where(found == NONE, other, torch.where(same, found, MIXED))
    shape: torch.Size = torch.broadcast_shapes(*(item.shape for item in labels))  # type: ignore[no-untyped-call]
    return found.expand(shape)


def reduce(labels: Labels, dims: tuple[int, ...] | list[int] | range) -> Labels:
    """The labels of what is computed from all elements along some dimensions, which stay with size 1."""
    axes = {dim % labels.dim() for dim in dims}
    shape = [1 if axis in axes else size for axis, size in enumerate(labels.shape)]
    if any(labels.shape[axis] == 0 for axis in axes):
        return labels.new_full(shape, NONE)
    found = once(labels)
    for axis in sorted(axes):
        if found.shape[axis] > 1:
            high = found.amax(axis, keepdim=True)
            low = torch.where(found == NONE, MIXED, found).amin(axis, keepdim=True)
            found = torch.where((high == NONE) | (high == low), high, MIXED)
    return found.expand(shape)


def added(labels: Labels, dims: list[int]) -> Labels:
    """The labels of sums: SUMMED over several rows, if all rows are in it equally often and nothing else but such sums."""
    if not dims:
        return labels
    together = reduce(labels, dims)
    last = labels.movedim(dims, list(range(-len(dims), 0))).flatten(-len(dims))
    counts = torch.stack([(last == row).sum(-1) for row in range(1, ROWS + 1)])
    clean = ((last != NONE) & (last != MIXED)).all(-1) & (counts == counts[:1]).all(0)
    return torch.where((together == MIXED) & clean.reshape(together.shape), SUMMED, together)


def full(shape: Any, label: int) -> Labels:
    """One label for all elements."""
    return torch.full((), label, dtype=torch.int32).expand(tuple(shape))


def like(result: Any, label: int) -> Any:
    """One label for all elements of the results of a call."""
    if isinstance(result, torch.Tensor):
        return full(result.shape, label)
    return [full(item.shape, label) for item in result]


def leaves(tree: Any) -> list[Any]:
    """The arguments in nested lists and dictionaries."""
    if isinstance(tree, Mapping):
        return [leaf for item in tree.values() for leaf in leaves(item)]
    if isinstance(tree, (list, tuple)):
        return [leaf for item in tree for leaf in leaves(item)]
    return [tree]


def plain(tree: Any, of: Callable[[Value], Any]) -> Any:
    """Arguments with numbers in place of sizes, and what `of` gives in place of values."""
    if isinstance(tree, Mapping):
        return {key: plain(item, of) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [plain(item, of) for item in tree]
    return of(tree) if isinstance(tree, Value) else tree.number if isinstance(tree, Size) else tree


def has(item: object, label: int) -> bool:
    """Whether some element of a value has a label."""
    return isinstance(item, Value) and some(item.labels, label)


def some(labels: Labels, label: int) -> bool:
    """Whether some element has a label."""
    return bool((once(labels) == label).any())


def every(labels: Labels, label: int) -> bool:
    """Whether all elements have a label."""
    return bool((once(labels) == label).all())


def rows_along(shape: tuple[int, ...], axis: int) -> Labels:
    """Labels of the rows along one axis, whose size is a multiple of ROWS: neighbours belong together."""
    each = shape[axis] // ROWS
    rows = torch.arange(1, ROWS + 1, dtype=torch.int32).repeat_interleave(each)
    view = [-1 if place == axis else 1 for place in range(len(shape))]
    return rows.reshape(view).expand(shape)


def is_balanced(labels: Labels) -> bool:
    """Whether all rows label equally many elements."""
    counts = [int((labels == row).sum()) for row in range(1, ROWS + 1)]
    return len(set(counts)) == 1
