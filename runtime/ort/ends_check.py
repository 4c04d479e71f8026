"""Whether rows of a cache may begin at the first position and end where they end, with padding behind: seen, not assumed.

A model that numbers positions by the size of its mask, not by the mask, sees shorter rows further on than they are. Where keys know
their distance alone that does not matter with padding in front, and does with padding behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.runtime.generation.batching.joining import JoiningState, row_mask
from bmgraph.runtime.generation.decode_loop import step_feeds
from bmgraph.runtime.generation.row_values import no_values
from bmgraph.runtime.generation.sampling import Array

SHORT, LONG = 3, 12
"""How many ids two rows have that are tried."""

CLOSE = 1e-5
"""By how much of the largest logit rows may differ, beside twice what they differ by from what each has alone."""

Start = Callable[[bool], JoiningState]
"""Gives an empty cache of one row; whether rows that join it end apart."""


def rows_may_end_apart(cache: CacheSpec, start: Start) -> bool:
    """Whether two rows of different lengths have one step's logits so, as with padding in front."""
    most = LONG if cache.limit is None else min(LONG, cache.limit - 1)
    if most < 2:
        return False
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, cache.vocabulary, count + 1).tolist() for count in (min(SHORT, most - 1), most)]
    alone = np.concatenate([_stepped(cache, start, [row], apart=False) for row in rows])
    front, apart = (_stepped(cache, start, rows, apart=apart) for apart in (False, True))
    if not np.isfinite(apart).all():
        return False
    bound = 2 * np.abs(front - alone).max() + CLOSE * np.abs(alone).max()
    return bool(np.abs(apart - front).max() <= bound)


def _stepped(cache: CacheSpec, start: Start, rows: Sequence[Sequence[int]], apart: bool) -> Array:
    """The logits f[B, V] after the last id of each row, which one step reads for all rows; the others were read by each alone."""
    states = []
    for row in rows:
        states.append(start(apart))
        before = np.array([row[:-1]], np.int64)
        states[-1].step(_feeds(cache, before, np.ones_like(before)))
    joined = states[0]
    joined.reserve(len(rows), max(map(len, rows)))
    for state in states[1:]:
        joined.join(state)
    lengths = np.array([len(row) for row in rows])
    mask = row_mask(lengths, int(lengths.max()), apart)
    last = np.array([[row[-1]] for row in rows], np.int64)
    found: Array = joined.step(_feeds(cache, last, mask, lengths - 1 if apart else None))
    return found.copy()


def _feeds(cache: CacheSpec, tokens: Array, mask: Array, ends: Array | None = None) -> dict[str, Array]:
    others = no_values(cache.others, len(tokens))
    return step_feeds(cache, tokens, mask, others, [tokens.shape[1] - 1], ends)
