"""Which sizes of steps give a row the bits that steps of two positions give, found by comparing them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bmgraph.errors import BackendError
from bmgraph.runtime.generation.draft_length import COSTS
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.generation.speculated_row import SpeculatedRow

PAIR = 2
"""The positions of a step of the reference: the last id and one more."""

LOOKED_AT = max(COSTS) + PAIR
"""How many positions behind those of a row are compared."""

SHIFTED = 4
"""How many of them are also compared as the first of a pair each, as the reference reads them."""


def equal_sizes(row: SpeculatedRow, vocabulary: int) -> tuple[int, ...]:
    """The sizes of COSTS whose steps give every position the same bits as steps of two, in logits and in what they leave in the cache;
    nothing where the row has too little room to compare. The row is as before afterwards.

    Raises BackendError where a position's bits depend on whether it is the first or the second of two.
    """
    if row.room is not None and row.room < LOOKED_AT:
        return ()
    ids = np.random.default_rng(0).integers(vocabulary, size=LOOKED_AT).tolist()
    pairs = _scores_of(row, ids, [PAIR] * (LOOKED_AT // PAIR))
    for begin in range(SHIFTED):
        found = row.read([ids[begin], ids[0]])[:1].copy()
        row.forget(1)
        if found.tobytes() != pairs[begin].tobytes():
            raise BackendError(
                "speculate: this engine gives a token other bits beside another one (a scale or a choice of experts over all tokens of "
                "a step, for example), so what is guessed would change what is chosen: generate without speculate="
            )
    row.forget(SHIFTED)
    others = [size for size in COSTS if size != PAIR]
    same = [
        size
        for size in others
        if _scores_of(row, ids, [size, PAIR]).tobytes() == pairs[: size + PAIR].tobytes()
    ]
    return tuple(sorted([PAIR, *same]))


def _scores_of(row: SpeculatedRow, ids: Sequence[int], sizes: Sequence[int]) -> Array:
    """The logits of ids that are read in steps of these sizes and taken back, f[sum of sizes, V]."""
    found, begin = [], 0
    for size in sizes:
        found.append(row.read(ids[begin : begin + size]).copy())
        begin += size
    row.forget(begin)
    return np.concatenate(found)
