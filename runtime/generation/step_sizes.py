"""Which sizes of steps give a row the bits that steps of two positions give, found by comparing them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bmgraph.errors import BackendError
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.generation.speculated_row import SpeculatedRow

PAIR = 2
"""The positions of a step of the reference: the last id and one more."""

FIRSTS = 4
"""How many positions are compared as the first and as the second of a pair."""


def room_to_compare(size: int) -> int:
    """How many positions behind those of a row `has_equal_bits` reads."""
    return FIRSTS + 1 if size == PAIR else size + PAIR


def has_equal_bits(row: SpeculatedRow, size: int, vocabulary: int) -> bool:
    """Whether a step of `size` positions gives each the bits that steps of two give, in logits and in what they leave in the cache. The row
    is as before afterwards.

    Raises BackendError where already a position's bits depend on whether it is the first or the second of two.
    """
    ids = np.random.default_rng(0).integers(vocabulary, size=size + FIRSTS).tolist()
    if size != PAIR:
        pairs = _scores_of(row, ids, [PAIR] * (size // PAIR + 1))
        return _scores_of(row, ids, [size, PAIR]).tobytes() == pairs.tobytes()
    pairs = _scores_of(row, ids, [PAIR] * (FIRSTS // PAIR))
    for place in range(FIRSTS):
        first = row.read([ids[place], ids[0]])[:1].copy()
        row.forget(1)
        if first.tobytes() != pairs[place].tobytes():
            raise BackendError(
                "speculate: this engine gives a token other bits beside another one (a scale or a choice of experts over all tokens of "
                "a step, for example), so what is guessed would change what is chosen: generate without speculate="
            )
    row.forget(FIRSTS)
    return True


def _scores_of(row: SpeculatedRow, ids: Sequence[int], sizes: Sequence[int]) -> Array:
    """The logits of ids that are read in steps of these sizes and taken back, f[sum of sizes, V]."""
    found, begin = [], 0
    for size in sizes:
        found.append(row.read(ids[begin : begin + size]).copy())
        begin += size
    row.forget(begin)
    return np.concatenate(found)
