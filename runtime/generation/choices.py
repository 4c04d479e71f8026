"""A choice among given texts: each step leaves only ids that go on with one of them, and what ends a text behind a whole one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bmgraph.errors import InputError
from bmgraph.runtime.generation.option_checks import shown
from bmgraph.runtime.generation.penalties import Array
from bmgraph.runtime.generation.tokenizer import Tokenizer

MOST_CHOICES, MOST_IDS = 4096, 2**18
"""How many texts may be given, and how many ids in all."""


class _Node:
    """What may come behind some ids: further ones, or the end of a text."""

    def __init__(self) -> None:
        self.below: dict[int, _Node] = {}
        self.is_whole = False


class Choices:
    """A trie of the ids of the texts; `ends` are the ids that end a text.

    Raises InputError for what is no list of texts (or of ids, without a tokenizer), for a text that the tokenizer does not write, for ids
    outside of the vocabulary, for a text that is longer than `most` ids with its end, and where no id ends a text.
    """

    def __init__(
        self, given: Any, tokenizer: Tokenizer | None, ends: Sequence[int], vocabulary: int, most: int
    ) -> None:
        if isinstance(given, str) or not isinstance(given, Sequence) or not 1 <= len(given) <= MOST_CHOICES:
            raise InputError(f"choices={shown(given)}: give a list of 1 to {MOST_CHOICES} texts")
        if not ends:
            raise InputError(
                "choices need an id that ends a text, and neither the model nor the tokenizer says one: give eos="
            )
        self.ends, self.first = list(ends), _Node()
        count = 0
        for number, item in enumerate(given):
            ids = _ids(item, number, tokenizer)
            if not all(isinstance(one, (int, np.integer)) and 0 <= one < vocabulary for one in ids):
                raise InputError(f"choice {number} holds what is no id of the {vocabulary} of this model")
            count += len(ids)
            if count > MOST_IDS:
                raise InputError(f"the choices have more than {MOST_IDS} ids: give fewer")
            if len(ids) >= most:
                raise InputError(
                    f"choice {number} has {len(ids)} ids, and with what ends it more than max_new_tokens={most}: allow more"
                )
            if not set(ids).isdisjoint(self.ends):
                raise InputError(f"choice {number} holds an id that ends a text: leave it out")
            node = self.first
            for one in ids:
                node = node.below.setdefault(int(one), _Node())
            node.is_whole = True


class ChoosingRow:
    """A row that chooses."""

    def __init__(self, choices: Choices) -> None:
        self._ends, self._node = choices.ends, choices.first

    def scores(self, logits: Array) -> Array:
        """Logits f[V] with minus infinity for ids that may not come next. Raises InputError where that leaves none."""
        allowed = [*self._node.below, *(self._ends if self._node.is_whole else ())]
        found = np.full(len(logits), -np.inf, np.float64)
        found[allowed] = logits[allowed]
        if found.max() == -np.inf:
            raise InputError(
                "the penalties leave none of the choices: loosen no_repeat_ngram_size, min_new_tokens or logit_bias"
            )
        return found

    def add(self, chosen: int) -> None:
        """The row goes on with an id, or ends."""
        self._node = self._node.below.get(chosen, self._node)


def _ids(item: Any, number: int, tokenizer: Tokenizer | None) -> list[int]:
    if tokenizer is None:
        if isinstance(item, str) or not isinstance(item, Sequence) or not len(item):
            raise InputError(
                f"choice {number} is {shown(item)}: this engine has no tokenizer, so give a list of ids"
            )
        return list(item)
    if not isinstance(item, str) or not item:
        raise InputError(f"choice {number} is {shown(item)}: give a text that is not empty")
    ids = tokenizer.encode_plain(item)
    if not ids or tokenizer.decode(ids) != item:
        raise InputError(
            f"choice {number} is {shown(item)}, which the tokenizer of this engine does not write"
        )
    return ids
