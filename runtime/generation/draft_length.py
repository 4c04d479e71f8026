"""How many positions a step of speculative decoding takes: what pays at the share of guesses that have been right."""

from __future__ import annotations

from collections.abc import Collection

from bmgraph.runtime.generation.prompt_lookup import CERTAINTIES

COSTS = {2: 1.0, 4: 1.5, 8: 2.5, 16: 4.5}
"""Seconds of a step by its positions, over those of two, with int4 weights: others are read longer, and their products cost less beside
that. One position alone takes 0.7; its bits are others."""

FIRST = (0.0, 0.35, 0.7, 0.8, 0.9, 0.95)
"""The share of right guesses that is assumed at first, by certainty: about that of a small language model on prose."""

assert len(FIRST) == CERTAINTIES

WEIGHT, MEMORY = 4.0, 0.95
"""For how many guesses the first assumption stands, and what of older guesses is left at every new one."""


class DraftLength:
    """The sizes of steps, and how often guesses of each certainty were right so far.

    A guess is only looked at if all before it in its step were right, so the ids that a step of `size` positions gives are
    expected to be 1 + p + ... + p^(size - 1).
    """

    def __init__(self) -> None:
        self._right = [WEIGHT * share for share in FIRST]
        self._tried = [WEIGHT] * CERTAINTIES

    def share(self, certainty: int) -> float:
        """The share of guesses of a certainty that are expected to be right."""
        return self._right[certainty] / self._tried[certainty]

    def choose(self, certainty: int, sizes: Collection[int], drafts: int) -> int:
        """The size among `sizes` that is expected to give most ids in its time, with `drafts` guesses at most."""
        share = self.share(certainty)

        def rate(size: int) -> float:
            return float(sum(share**place for place in range(min(size - 1, drafts) + 1))) / COSTS[size]

        return max(sizes, key=lambda size: (rate(size), -size))

    def note(self, certainty: int, right: int, wrong: int) -> None:
        """So many guesses of a step were right, then `wrong` was not (0 or 1)."""
        for hit in [1.0] * right + [0.0] * wrong:
            self._right[certainty] = self._right[certainty] * MEMORY + hit
            self._tried[certainty] = self._tried[certainty] * MEMORY + 1.0
