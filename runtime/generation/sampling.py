"""Sampling: choose the next id of each row from logits, greedily or among the likeliest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from bmgraph.errors import BackendError, InputError
from bmgraph.runtime.generation.logprobs import IdScore, id_score
from bmgraph.runtime.generation.option_checks import real_number, shown, whole_number
from bmgraph.runtime.generation.penalties import Array as Array
from bmgraph.runtime.generation.penalties import PenalisedRow, Penalties

HEAD, SMALL = 1024, 8192
"""Of a vocabulary with more than `SMALL` ids so many of the likeliest are put in order, and all only where these do not tell."""

CLOSE = 1e-9
"""Shares that differ by less may be those of other ids where they are summed in another order."""


@dataclass(frozen=True)
class Sampling(Penalties):
    """How to choose ids: greedily if `temperature` is 0, else by sampling from softmax(scores / temperature), after the
    penalties.

    Sampled from are the `top_k` likeliest ids (0: all), of these the smallest set whose probabilities sum to at least `top_p`,
    and of these the ids that are at least `min_p` times as likely as the likeliest. `seed` makes it repeatable, one number or one
    for each prompt: with its own seed a prompt gets the ids that it gets alone. The ids of a row do not depend on the other rows.

    Raises InputError for a negative temperature, a share outside its range, and what is no number. Source: Fan et al. 2018
    (top-k), Holtzman et al. 2020 (top-p), Nguyen et al. 2024 (min-p).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | Sequence[int] | None = None
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        temperature, top_p = real_number("temperature", self.temperature), real_number("top_p", self.top_p)
        min_p, top_k = real_number("min_p", self.min_p), whole_number("top_k", self.top_k)
        if not 0 <= temperature < math.inf:
            raise InputError(
                f"temperature={shown(self.temperature)}: give 0 for greedy decoding, or a positive number"
            )
        if not 0 < top_p <= 1:
            raise InputError(f"top_p={shown(self.top_p)}: give a number above 0 and up to 1")
        if not 0 <= min_p <= 1:
            raise InputError(f"min_p={shown(self.min_p)}: give a number from 0 to 1")
        if top_k < 0:
            raise InputError(f"top_k={shown(self.top_k)}: give a whole number of 1 or more, or 0 for all ids")
        checked = {
            "temperature": temperature,
            "top_p": top_p,
            "min_p": min_p,
            "top_k": top_k,
            "seed": _seed(self.seed),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def penalties(self) -> Penalties:
        """The penalties alone."""
        return Penalties(**{field.name: getattr(self, field.name) for field in fields(Penalties)})


class Constraint(Protocol):
    """What leaves only some ids to a row."""

    def scores(self, logits: Array) -> Array:
        """Logits f[V] with minus infinity for ids that may not come next. Raises InputError where that leaves none."""

    def add(self, chosen: int) -> None:
        """The row goes on with an id."""


class Sampler:
    """Chooses ids for a number of rows, with one random generator per row.

    `prompts` are the ids that each row begins with, for penalties; `ends` those that end a text. `each`: so many rows, one after
    the other, are of one prompt; `first`: the number of the first row among these. `logprobs`: how many of the likeliest ids are scored
    with each chosen one (`scored`), None for no scores. `choosing`: what leaves only some ids to each row, for all rows or none.
    """

    def __init__(
        self,
        sampling: Sampling,
        rows: int,
        prompts: Sequence[Sequence[int]] = (),
        ends: Sequence[int] = (),
        each: int = 1,
        logprobs: int | None = None,
        first: int = 0,
        choosing: Sequence[Constraint] = (),
    ) -> None:
        self._choosing = choosing
        self._sampling, self.logprobs = sampling, logprobs
        self._scores: dict[int, IdScore] = {}
        self._generators = [np.random.default_rng(item) for item in _seeds(sampling.seed, rows, each, first)]
        penalties = sampling.penalties
        self._rows: list[PenalisedRow] = []
        if not penalties.is_neutral:
            begun = prompts or [()] * rows
            self._rows = [PenalisedRow(penalties, begun[row], ends) for row in range(rows)]

    def pick(self, logits: Array) -> Array:
        """The next id of each row, i64[B], from logits f[B, V].

        Raises BackendError for logits that name no likeliest id: NaN, positive infinity, or all negative infinity. Raises
        InputError where the penalties leave no id.
        """
        return np.array([self.pick_one(row, scores) for row, scores in enumerate(logits)], np.int64)

    def pick_one(self, row: int, logits: Array) -> int:
        """The next id of one row from its logits f[V]; raises what `pick` does."""
        greedy, given = likeliest(row, logits), logits
        if self._rows:
            logits = self._rows[row].scores(logits)
            greedy = int(logits.argmax())
        if self._choosing:
            logits = self._choosing[row].scores(logits)
            greedy = int(logits.argmax())
        picked = greedy if self._sampling.temperature == 0 else self._sample(logits, self._generators[row])
        if self._rows:
            self._rows[row].add(picked)
        if self._choosing:
            self._choosing[row].add(picked)
        if self.logprobs is not None:
            self._scores[row] = id_score(given, picked, self.logprobs)
        return picked

    def scored(self, row: int) -> IdScore | None:
        """The score of the id that a row chose last; None if scores are not wanted."""
        return self._scores.get(row)

    def _sample(self, logits: Array, generator: np.random.Generator) -> int:
        below = logits.astype(np.float64) - float(logits.max())
        with np.errstate(over="ignore"):  # far below at a tiny temperature: minus infinity, a weight of 0
            weights = np.exp(below / self._sampling.temperature)
        share = generator.random()
        found = self._drawn(weights, _head(weights), share) if len(weights) > SMALL else None
        return self._drawn_of_all(weights, share) if found is None else found

    def _drawn_of_all(self, weights: Array, share: float) -> int:
        """The id at a share of the weights of the ids that may be drawn, the likeliest first."""
        order = np.argsort(-weights, kind="stable")
        if self._sampling.top_k:
            order = order[: self._sampling.top_k]
        cumulative = np.cumsum(weights[order])
        kept = int(np.searchsorted(cumulative, self._sampling.top_p * cumulative[-1])) + 1
        if self._sampling.min_p:  # the largest weight is 1
            kept = min(kept, int(np.count_nonzero(weights[order] >= self._sampling.min_p)))
        return _at_share(order, cumulative[:kept], share)

    def _drawn(self, weights: Array, head: Array, share: float) -> int | None:
        """As `_drawn_of_all`, for the likeliest ids alone in order; None where these do not tell."""
        sampling = self._sampling
        if sampling.top_k and sampling.top_k > len(head):
            return None
        order = head[: sampling.top_k] if sampling.top_k else head
        cumulative = np.cumsum(weights[order])
        total = float(cumulative[-1] if sampling.top_k else weights.sum()) if len(order) else 0.0
        known = len(order) if sampling.top_k else None  # how many ids may be drawn, where that is known
        if len(order) and sampling.top_p * total < cumulative[-1] * (1 - CLOSE):
            known = int(np.searchsorted(cumulative, sampling.top_p * total)) + 1
        if sampling.min_p:
            likely = int(np.count_nonzero(weights >= sampling.min_p))
            if likely <= len(order):
                known = min(known or likely, likely)
        if known is not None:
            return _at_share(order, cumulative[: min(known, len(order))], share)
        if (
            not len(order)
            or share * total >= cumulative[-1] * (1 - CLOSE)
            or sampling.top_p < 1
            or sampling.min_p
        ):
            return None
        return int(order[int(np.searchsorted(cumulative, share * total, side="right"))])


def _head(weights: Array) -> Array:
    """The ids whose weights are above that at the place `HEAD`, the likeliest first: the beginning of the order of all."""
    bound = np.partition(weights, len(weights) - HEAD)[len(weights) - HEAD]
    ids = np.flatnonzero(weights > bound)
    found: Array = ids[np.argsort(-weights[ids], kind="stable")]
    return found


def _at_share(order: Array, cumulative: Array, share: float) -> int:
    index = int(np.searchsorted(cumulative, share * cumulative[-1], side="right"))
    return int(order[min(index, len(cumulative) - 1)])


def likeliest(row: int, logits: Array) -> int:
    """The id with the largest of the logits f[V] of a row. Raises BackendError where there is none: NaN, or an infinite one."""
    found = int(logits.argmax())  # of a NaN, if there is one
    if not np.isfinite(logits[found]):
        raise BackendError(
            f"the logits of row {row} are not finite (the largest is {logits[found]}), so no id can be "
            "chosen: check the weights, and a half-precision model for overflow"
        )
    return found


def _seed(given: object) -> int | tuple[int, ...] | None:
    """A seed, or one for each prompt. Raises InputError for another value."""
    if given is None:
        return None
    several = isinstance(given, (list, tuple)) or (hasattr(given, "ndim") and given.ndim == 1)
    values: Any = given
    found = tuple(whole_number("seed", item) for item in (values if several else (values,)))
    if any(item < 0 for item in found):
        raise InputError(f"seed={shown(given)}: give an integer of 0 or more, or None")
    return found if several else found[0]


def _seeds(
    seed: int | Sequence[int] | None, rows: int, each: int, first: int
) -> list[np.random.SeedSequence]:
    """What the generator of each row begins with: of one seed by the number of the row, of several by that among the rows of
    its prompt, of which the first row has the number `first`."""
    if seed is None or isinstance(seed, int):
        entropy = np.random.SeedSequence(seed).entropy
        return [np.random.SeedSequence(entropy, spawn_key=(first + row,)) for row in range(rows)]
    if len(seed) * each != rows:
        raise InputError(
            f"seed has {len(seed)} numbers: give one, or one for each of the {rows // each} prompts"
        )
    return [
        np.random.SeedSequence(item, spawn_key=(first + index,)) for item in seed for index in range(each)
    ]
