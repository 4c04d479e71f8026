"""Which rows of a batch run in one call, where attention appends to the cache in place.

Its kernel takes several new positions behind cached ones for one row alone. Where it rotates queries and keys itself, it also turns the
new positions of all rows of a call by the angles of the first row; a single new position of each row has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.runtime.generation.sampling import Array

Run = Callable[[Mapping[str, Array]], list[Array]]


def rows_together(cache: CacheSpec, feeds: Mapping[str, Array], cached: int) -> list[slice]:
    """The runs of rows that take one call each, in order; `cached` positions are in the cache."""
    rows, new = feeds[cache.tokens.name].shape
    if rows == 1 or new == 1 or not any(slot.in_place for slot in cache.slots):
        return [slice(0, rows)]
    if cached:
        return [slice(row, row + 1) for row in range(rows)]
    if not cache.rows_alike:
        return [slice(0, rows)]
    begins = [0, *(row for row in range(1, rows) if not _alike(cache, feeds, row - 1, row)), rows]
    return [slice(begin, end) for begin, end in pairwise(begins)]


def _alike(cache: CacheSpec, feeds: Mapping[str, Array], first: int, second: int) -> bool:
    """Whether two rows have the same padding and numbers of positions."""
    return all(
        bool((feeds[spec.name][first] == feeds[spec.name][second]).all())
        for spec in (cache.mask, cache.positions)
        if spec is not None
    )


def cached_positions(cache: CacheSpec, feeds: Mapping[str, Array]) -> int:
    """How many positions a batch gives as cached."""
    slot = cache.slots[0]
    return int(feeds[slot.past.name].shape[slot.axis])


def run_in_parts(
    run: Run,
    parts: Sequence[slice],
    cache: CacheSpec,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    feeds: Mapping[str, Array],
) -> list[Array]:
    """The outputs of `run` on each part of the rows alone, put together."""
    rows = cache.tokens.shape[0]
    found = [
        run({spec.name: of_rows(spec, feeds[spec.name], rows, part) for spec in inputs}) for part in parts
    ]
    return [
        np.concatenate(pieces, spec.shape.index(rows)) if rows in spec.shape else pieces[0]
        for spec, pieces in zip(outputs, zip(*found))
    ]


def of_rows(spec: TensorSpec, value: Array, rows: object, part: slice) -> Array:
    """What some rows have of an input's value; `rows` is the name of their number."""
    if rows not in spec.shape:
        return value
    index = [slice(None)] * value.ndim
    index[spec.shape.index(rows)] = part
    return np.ascontiguousarray(value[tuple(index)])
