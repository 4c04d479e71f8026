"""Windows that slide: a text that outgrows the positions of a cache goes on from its beginning and its newest part.

What stays is read again as a prompt, so that all that a step computes is what the model computes for these ids alone: angles, learned
positions, distances and the model's own windows are right whatever they are, and no key is moved. Keys that are kept in place (llama.cpp's
context shift, or Xiao et al. 2023, arXiv:2309.17453, whose first tokens are `keep` here) hold what they took from tokens that are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bmgraph.errors import InputError
from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.runtime.generation.option_checks import shown, whole_number
from bmgraph.runtime.generation.sampling import Array


@dataclass(frozen=True)
class SlidingWindow:
    """A text reads `size` of its ids at most: where it has more, its first `keep` stay, and the newest half of the others that fit."""

    size: int
    keep: int = 0

    def kept(self, ids: Sequence[int]) -> list[int]:
        """What stays of a text: all of one that fits.

        Example:
            >>> SlidingWindow(8, keep=2).kept(range(9))
            [0, 1, 6, 7, 8]
        """
        if len(ids) <= self.size:
            return list(ids)
        return [*ids[: self.keep], *ids[len(ids) - (self.size - self.keep) // 2 :]]

    def positions(self, text: int, new: int) -> int:
        """How many positions a text of so many ids takes at most when it goes on by `new`."""
        return min(text + new, self.size)


def window_of(cache: CacheSpec, encodes: bool, window: object, keep: object) -> SlidingWindow | None:
    """The window that a call asks for, of a model that may have an encoder (`encodes`); None for none.

    window: True for all positions of the model, or how many. Raises InputError for one that the model cannot have, and for `keep` beyond
    it.
    """
    first = whole_number("keep", keep)
    if window is None or window is False:
        if first:
            raise InputError(f"keep={first} is for texts that slide: give window=, too")
        return None
    limit = cache.limit
    if encodes:
        raise InputError(
            "window is for decoders: this model has an encoder, and its answers end at their positions; give max_new_tokens"
        )
    if window is True:
        if limit is None:
            raise InputError(
                "window=True: this model has no bound on positions; give how many, as in window=2048"
            )
        size = limit
    else:
        size = whole_number("window", window)
    if first < 0:
        raise InputError(f"keep={shown(first)}: give how many of the first tokens stay, 0 or more")
    if limit is not None and size > limit:
        raise InputError(f"window={shown(size)} is more than the {limit} positions of this model")
    if size - first < 2:
        raise InputError(
            f"window={shown(size)} with keep={shown(first)}: two tokens or more must be left to slide; give a larger window"
        )
    return SlidingWindow(size, first)


class WindowedTexts:
    """The ids that rows have read and are about to read, within a window."""

    def __init__(self, window: SlidingWindow, begun: Sequence[Sequence[int]]) -> None:
        self._window, self._rows = window, [window.kept(ids) for ids in begun]

    @property
    def rows(self) -> list[list[int]]:
        """The ids of each row."""
        return self._rows

    def add(self, chosen: Array) -> bool:
        """Each row goes on with an id; returns whether one of them is longer than the window."""
        for ids, item in zip(self._rows, chosen.tolist()):
            ids.append(item)
        return any(len(ids) > self._window.size for ids in self._rows)

    def slide(self, done: Array, ragged: bool) -> None:
        """Forget what does not stay of rows that are too long; and where rows may be `ragged`, all but one id of those that are done."""
        self._rows = [
            ids[-1:] if ragged and ended else self._window.kept(ids)
            for ids, ended in zip(self._rows, np.asarray(done).tolist())
        ]
