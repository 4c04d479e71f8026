"""A step of many new positions in pieces: attention that appends to the cache in place holds the scores of all new positions at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.runtime.generation.sampling import Array

MOST_NEW = 256
"""So many new positions of a row are read at once: products gain nothing from more, and their scores grow with all positions."""


def pieces(cache: CacheSpec, feeds: Mapping[str, Array]) -> Iterator[Mapping[str, Array]]:
    """The feeds of the steps that one step, whose last new position alone is scored, is made of; itself if it is short."""
    new = feeds[cache.tokens.name].shape[1]
    if new <= MOST_NEW or not any(slot.in_place for slot in cache.slots):
        yield feeds
        return
    for begin in range(0, new, MOST_NEW):
        end = min(begin + MOST_NEW, new)
        own = dict(feeds)
        for spec in (cache.tokens, cache.positions):
            if spec is not None:
                own[spec.name] = feeds[spec.name][:, begin:end]
        for spec in (cache.mask, cache.extent):
            if spec is not None:
                own[spec.name] = feeds[spec.name][:, : feeds[spec.name].shape[1] - new + end]
        if cache.scored is not None:
            own[cache.scored.name] = np.array([end - begin - 1], np.int64)
        yield own
