"""Choosing the next id from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bmgraph.errors import InputError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sampling:
    """How ids are chosen: the likeliest where temperature is 0, else drawn from softmax(logits / temperature) cut to the
    fewest ids that hold `top_p` of it. `seed` makes draws repeatable; a row's draws do not depend on its neighbours.

    Raises InputError for a temperature below 0 or a top_p outside of (0, 1]. Source: Holtzman et al. 2020 (top-p).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or not np.isfinite(self.temperature):
            raise InputError(
                f"temperature={self.temperature}: give 0 for the likeliest id, or a number above"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: give a share above 0 and up to 1")
        if self.seed is not None and (not isinstance(self.seed, int) or self.seed < 0):
            raise InputError(f"seed={self.seed!r}: give a whole number from 0, or None")


class Sampler:
    """Draws ids for a number of rows, each from a generator of its own."""

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self._sampling = sampling
        root = np.random.SeedSequence(sampling.seed)
        self._generators = [
            np.random.default_rng(np.random.SeedSequence(root.entropy, spawn_key=(row,)))
            for row in range(rows)
        ]

    def pick(self, logits: Array) -> Array:
        """The next id of each row, i64[B], from logits f[B, V]."""
        if self._sampling.temperature == 0:
            likeliest: Array = np.argmax(logits, -1).astype(np.int64)
            return likeliest
        found = [self._draw(row, generator) for row, generator in zip(logits, self._generators)]
        return np.array(found, np.int64)

    def _draw(self, logits: Array, generator: np.random.Generator) -> int:
        scaled = logits.astype(np.float64) / self._sampling.temperature
        weights = np.exp(scaled - scaled.max())
        order = np.argsort(-weights, kind="stable")
        heap = np.cumsum(weights[order])
        kept = int(np.searchsorted(heap, self._sampling.top_p * heap[-1])) + 1
        heap = heap[:kept]
        place = int(np.searchsorted(heap, generator.random() * heap[-1], side="right"))
        return int(order[min(place, len(heap) - 1)])
