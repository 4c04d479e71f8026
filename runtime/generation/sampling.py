"""Sampling: choose the next id of each row from logits, greedily or by temperature and top-p."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from bmgraph.errors import BackendError, InputError
from bmgraph.runtime.generation.option_checks import real_number, shown, whole_number

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sampling:
    """How to choose ids: greedily if `temperature` is 0, else by sampling from softmax(logits / temperature).

    Sampling is limited to the smallest set of ids whose probabilities sum to at least `top_p`. `seed` makes it
    repeatable; the ids of a row do not depend on the other rows.

    Raises InputError for a negative temperature, a top_p outside (0, 1], and what is no number. Source: Holtzman et al. 2020 (top-p).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        temperature, top_p = real_number("temperature", self.temperature), real_number("top_p", self.top_p)
        if not 0 <= temperature < math.inf:
            raise InputError(
                f"temperature={shown(self.temperature)}: give 0 for greedy decoding, or a positive number"
            )
        if not 0 < top_p <= 1:
            raise InputError(f"top_p={shown(self.top_p)}: give a number above 0 and up to 1")
        seed = None if self.seed is None else whole_number("seed", self.seed)
        if seed is not None and seed < 0:
            raise InputError(f"seed={shown(self.seed)}: give an integer of 0 or more, or None")
        for name, value in {"temperature": temperature, "top_p": top_p, "seed": seed}.items():
            object.__setattr__(self, name, value)


class Sampler:
    """Chooses ids for a number of rows, with one random generator per row."""

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self._sampling = sampling
        root = np.random.SeedSequence(sampling.seed)
        self._generators = [
            np.random.default_rng(np.random.SeedSequence(root.entropy, spawn_key=(row,)))
            for row in range(rows)
        ]

    def pick(self, logits: Array) -> Array:
        """The next id of each row, i64[B], from logits f[B, V].

        Raises BackendError for logits that name no likeliest id: NaN, positive infinity, or all negative infinity.
        """
        wrong = np.flatnonzero(~np.isfinite(logits.max(-1)))  # the largest of a row is NaN if one is
        if wrong.size:
            raise BackendError(
                f"the logits of row {int(wrong[0])} are not finite (the largest is {logits.max(-1)[wrong[0]]}), so no id can be "
                "chosen: check the weights, and a half-precision model for overflow"
            )
        if self._sampling.temperature == 0:
            greedy: Array = np.argmax(logits, -1).astype(np.int64)
            return greedy
        sampled = [self._sample(row, generator) for row, generator in zip(logits, self._generators)]
        return np.array(sampled, np.int64)

    def _sample(self, logits: Array, generator: np.random.Generator) -> int:
        below = logits.astype(np.float64) - float(logits.max())
        with np.errstate(over="ignore"):  # far below at a tiny temperature: minus infinity, a weight of 0
            weights = np.exp(below / self._sampling.temperature)
        order = np.argsort(-weights, kind="stable")
        cumulative = np.cumsum(weights[order])
        kept = int(np.searchsorted(cumulative, self._sampling.top_p * cumulative[-1])) + 1
        cumulative = cumulative[:kept]
        index = int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
        return int(order[min(index, len(cumulative) - 1)])
