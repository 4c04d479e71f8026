"""Guesses what a text goes on with from what followed before, in its prompt and in what was generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LONGEST = 4
"""The longest run of ids that is looked up; how much longer two places agree is counted up to FURTHEST."""

FURTHEST = 16

CERTAINTIES = FURTHEST.bit_length() + 1
"""How many kinds of guesses there are, by the lengths of what they rest on: none, 1, 2 to 3, 4 to 7, 8 to 15, 16."""


@dataclass(frozen=True)
class Draft:
    """Ids that may come next, and how certain they are: the number of bits of the length of what was found again, 0 for a mere
    filling."""

    ids: tuple[int, ...] = ()
    certainty: int = 0


class PromptLookup:
    """The ids of one text, and where each run of up to LONGEST of them came last.

    Source: Saxena 2023 (prompt lookup decoding), Yang et al. 2023 (arXiv:2304.04487). `vocabulary`: ids below 0 or from it on are
    never guessed.

    Example:
        >>> lookup = PromptLookup([7, 1, 2, 3, 9, 1, 2], 10)
        >>> lookup.draft(2).ids
        (3, 9)
    """

    def __init__(self, ids: Sequence[int], vocabulary: int) -> None:
        self._ids: list[int] = []
        self._vocabulary = vocabulary
        self._followers: dict[tuple[int, ...], int] = {}
        for item in ids:
            self.add(item)

    def add(self, item: int) -> None:
        """The text goes on with an id."""
        place = len(self._ids)
        for length in range(1, min(LONGEST, place) + 1):
            self._followers[tuple(self._ids[place - length :])] = place
        self._ids.append(item)

    def found(self) -> tuple[int, int] | None:
        """Where the text is that followed the longest run of its last ids the last time, and how long that run is; None where its last
        id is new."""
        ids = self._ids
        for length in range(min(LONGEST, len(ids)), 0, -1):
            place = self._followers.get(tuple(ids[len(ids) - length :]))
            if place is not None:
                while length < min(FURTHEST, place) and ids[place - length - 1] == ids[-length - 1]:
                    length += 1
                return place, length
        return None

    def draft(self, count: int) -> Draft:
        """Up to `count` ids that may come next."""
        found = self.found()
        if found is None or count < 1:
            return Draft()
        place, length = found
        guessed: list[int] = []
        while len(guessed) < count:  # behind the end of the text comes what is guessed: it repeats
            at = place + len(guessed)
            item = self._ids[at] if at < len(self._ids) else guessed[at - len(self._ids)]
            if not 0 <= item < self._vocabulary:
                break
            guessed.append(item)
        return Draft(tuple(guessed), length.bit_length())
