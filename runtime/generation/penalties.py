"""What changes the scores of ids by what a text already holds: penalties, n-grams that may not come again, a least length."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bmgraph.errors import InputError
from bmgraph.runtime.generation.option_checks import real_number, shown, whole_number

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """How scores change before an id is chosen; the values by default change nothing.

    repetition_penalty: scores of ids that the prompt or the answer holds are divided by it where they are positive, and
    multiplied where they are negative (Keskar et al. 2019). presence_penalty, frequency_penalty: taken from the score of an id
    that the answer holds, once and as often as it does. no_repeat_ngram_size: no run of so many ids comes twice in prompt and
    answer together (Paulus et al. 2018). min_new_tokens: no id ends the text before. logit_bias: added to the scores of ids.

    Raises InputError for values that are no numbers of these kinds.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        checked: dict[str, object] = {}
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            checked[name] = value = real_number(name, getattr(self, name))
            if not np.isfinite(value) or (name == "repetition_penalty" and value <= 0):
                kind = "a positive number" if name == "repetition_penalty" else "a finite number"
                raise InputError(f"{name}={shown(getattr(self, name))}: give {kind}")
        for name in ("no_repeat_ngram_size", "min_new_tokens"):
            checked[name] = count = whole_number(name, getattr(self, name))
            if count < 0:
                raise InputError(f"{name}={shown(getattr(self, name))}: give a whole number of 0 or more")
        checked["logit_bias"] = _biases(self.logit_bias)
        for name, item in checked.items():
            object.__setattr__(self, name, item)

    @property
    def is_neutral(self) -> bool:
        """Whether no score is changed."""
        return self == Penalties()


class PenalisedRow:
    """The ids of one row, and its scores by a row's penalties."""

    def __init__(self, penalties: Penalties, prompt: Sequence[int], ends: Sequence[int]) -> None:
        self._penalties, self._ends = penalties, list(ends)
        self._ids = [int(item) for item in prompt]
        self._new: dict[int, int] = {}
        self._count = 0
        self._followers: dict[tuple[int, ...], list[int]] = {}
        for place in range(len(self._ids)):
            self._note_ngram(place)

    def add(self, chosen: int) -> None:
        """The row goes on with an id."""
        self._ids.append(chosen)
        self._new[chosen] = self._new.get(chosen, 0) + 1
        self._count += 1
        self._note_ngram(len(self._ids) - 1)

    def continued(self, chosen: int) -> PenalisedRow:
        """A row of its own that goes on with an id."""
        found = copy.copy(self)
        found._ids, found._new = list(self._ids), dict(self._new)
        found._followers = {begin: list(items) for begin, items in self._followers.items()}
        found.add(chosen)
        return found

    def scores(self, logits: Array) -> Array:
        """The scores f64[V] of what comes next, from logits f[V]."""
        found, penalties, size = logits.astype(np.float64), self._penalties, len(logits)
        if penalties.repetition_penalty != 1.0:
            seen = np.unique([item for item in self._ids if 0 <= item < size]).astype(np.int64)
            values, factor = found[seen], penalties.repetition_penalty
            found[seen] = np.where(values < 0, values * factor, values / factor)
        if self._new and (penalties.presence_penalty or penalties.frequency_penalty):
            ids, counts = np.array(list(self._new)), np.array(list(self._new.values()))
            found[ids] -= penalties.presence_penalty + penalties.frequency_penalty * counts
        for item, bias in (penalties.logit_bias or {}).items():
            if not 0 <= item < size:
                raise InputError(f"logit_bias has id {item}: the vocabulary has ids 0 to {size - 1}")
            found[item] += bias
        found[self._banned()] = -np.inf
        if found.max() == -np.inf:
            raise InputError(
                "no id is left to choose: loosen no_repeat_ngram_size, min_new_tokens or logit_bias"
            )
        return found

    def _note_ngram(self, place: int) -> None:
        length = self._penalties.no_repeat_ngram_size
        if length and place + 1 >= length:
            begin = tuple(self._ids[place + 1 - length : place])
            self._followers.setdefault(begin, []).append(self._ids[place])

    def _banned(self) -> list[int]:
        """The ids that would repeat an n-gram, or end the text too early."""
        length = self._penalties.no_repeat_ngram_size
        banned = list(self._ends) if self._count < self._penalties.min_new_tokens else []
        if length and len(self._ids) + 1 >= length:
            last = tuple(self._ids[len(self._ids) + 1 - length :])
            banned += [item for item in self._followers.get(last, []) if item >= 0]
        return banned


def _biases(given: object) -> Mapping[int, float] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise InputError(f"logit_bias={shown(given)}: give a dict of ids and numbers")
    found = {
        whole_number("logit_bias", item): real_number("logit_bias", value) for item, value in given.items()
    }
    if any(value != value or value == float("inf") for value in found.values()):
        raise InputError(f"logit_bias={shown(given)}: give finite numbers, or minus infinity to forbid an id")
    return found
