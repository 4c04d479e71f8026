"""One row of speculative decoding: its cache, its logits, and steps that read guesses and take the wrong ones back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.runtime.generation.decode_loop import Decoder, DecodeState, step_feeds
from bmgraph.runtime.generation.prompt_lookup import Draft
from bmgraph.runtime.generation.sampling import Array


class RewindingState(DecodeState, Protocol):
    """The KV cache of one row, from which positions can be taken back."""

    def scores(self, feeds: Mapping[str, Array]) -> Array:
        """Append new tokens to the cache; returns the logits f[K, V] of the scored ones, in memory that the next step may overwrite."""

    def forget(self, count: int) -> None:
        """Take the last `count` positions from the cache."""


@runtime_checkable
class RewindingDecoder(Decoder, Protocol):
    """A decoder whose states can be taken back."""

    equal_sizes: dict[bytes, dict[int, bool]]
    """Whether steps of a size have the bits of the reference, by the inputs of a row, as far as it was compared (`step_sizes.py`)."""

    @property
    def no_rewinding(self) -> str:
        """Why its states cannot be taken back, or not all new positions be scored; empty if they can."""

    def start(self, batch_size: int, encoder_feeds: Mapping[str, Array], most: int) -> RewindingState:
        """An empty cache, as `Decoder.start` gives it."""


@dataclass(frozen=True)
class Guesses:
    """What became of a step's guesses of one certainty: so many were right, then `wrong` was not (0 or 1); the rest was not looked at."""

    certainty: int
    right: int
    wrong: int


class SpeculatedRow:
    """One row of a generation with its own cache: a prompt that is read, and steps that read the last id with guesses behind it.

    `inputs` are the values of the row's inputs that choose what it runs on, such as a delta.
    """

    def __init__(
        self, state: RewindingState, cache: CacheSpec, begun: Sequence[int], row_inputs: Mapping[str, Array]
    ) -> None:
        """Reads the ids that the row begins with."""
        self._state, self._cache, self._row_inputs = state, cache, row_inputs
        self.inputs = b"".join(value.tobytes() for value in row_inputs.values())
        self._written, self._held = list(begun), 0
        self._scores = state.step(self._feeds(begun, [len(begun) - 1])).copy()
        self._held, self._at, self._draft = len(begun), 0, Draft()

    @property
    def ready(self) -> bool:
        """Whether the logits of the next id are known."""
        return self._at < len(self._scores)

    @property
    def scores(self) -> Array:
        """The logits f[V] of the next id."""
        found: Array = self._scores[self._at]
        return found

    @property
    def room(self) -> int | None:
        """How many positions the cache can still take; None without a bound."""
        return None if self._cache.limit is None else self._cache.limit - self._held

    def read(self, tokens: Sequence[int]) -> Array:
        """Append ids to the cache; the logits f[K, V] of all of them, in memory that the next call may overwrite."""
        found = self._state.scores(self._feeds(tokens, range(len(tokens))))
        self._held += len(tokens)
        return found

    def forget(self, count: int) -> None:
        """Take the last positions back."""
        if count:
            self._state.forget(count)
            self._held -= count

    def step(self, draft: Draft, size: int) -> int:
        """Read the last id and a draft, filled up to `size` positions; returns how many ids of the draft these hold."""
        tokens = [self._written[-1], *draft.ids[: size - 1]]
        tokens += tokens[:1] * (size - len(tokens))
        used, again = min(len(draft.ids), size - 1), 0
        if self.room is not None and size > self.room:
            self.forget(1)  # there is no room for a filling behind the last id: one before it
            tokens, used, again = self._written[-2:], 0, 1
        self._draft = Draft(draft.ids[:used], draft.certainty)
        self._scores, self._at = self.read(tokens)[again:], 0
        return used

    def choose(self, item: int) -> Guesses | None:
        """The row goes on with an id; returns what became of the step's guesses once no more of its logits can be read."""
        right, guessed = self._at, self._draft.ids
        self._written.append(item)
        if right < len(guessed) and guessed[right] == item:
            self._at += 1
            return None
        self.forget(len(self._scores) - right - 1)
        self._at = len(self._scores)
        return Guesses(self._draft.certainty, right, int(right < len(guessed)))

    def _feeds(self, tokens: Sequence[int], scored: Sequence[int]) -> dict[str, Array]:
        mask = np.ones((1, self._held + len(tokens)), np.int64)
        return step_feeds(self._cache, np.array([tokens], np.int64), mask, self._row_inputs, scored)
