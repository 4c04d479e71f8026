"""Beam search: several texts of a prompt are continued side by side, and the likeliest are kept.

Which texts stay, and when a search ends, is as in Hugging Face's `generate`, prompt by prompt: the results of a prompt do not depend
on the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bmgraph.errors import InputError
from bmgraph.runtime.generation.decode_loop import (
    Decoder,
    Speed,
    beginnings,
    encoder_feeds,
    pad,
    prompts_read,
    step_feeds,
)
from bmgraph.runtime.generation.option_checks import real_number, shown, whole_number
from bmgraph.runtime.generation.penalties import PenalisedRow
from bmgraph.runtime.generation.sampling import Array, Sampling, likeliest

NEVER = "never"

FAR = -1e9
"""The score of a beam that is none yet: at first all beams of a prompt hold the same text, and only one counts."""


@dataclass(frozen=True)
class BeamSearch:
    """How to search: with `num_beams` texts of each prompt; a text of t new tokens is worth the sum of their log-probabilities
    divided by t ** `length_penalty`.

    early_stopping: True ends a search as soon as there are num_beams finished texts, False when the best that goes on is worth less
    than all of these at its length now, "never" when it would be at any length. Raises InputError for other values.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        count, penalty = (
            whole_number("num_beams", self.num_beams),
            real_number("length_penalty", self.length_penalty),
        )
        if count < 1:
            raise InputError(f"num_beams={shown(self.num_beams)}: give a whole number of 1 or more")
        if not np.isfinite(penalty):
            raise InputError(f"length_penalty={shown(self.length_penalty)}: give a finite number")
        if not isinstance(self.early_stopping, (bool, str)) or self.early_stopping not in (
            True,
            False,
            NEVER,
        ):
            raise InputError(f"early_stopping={shown(self.early_stopping)}: give True, False or {NEVER!r}")
        object.__setattr__(self, "num_beams", count)
        object.__setattr__(self, "length_penalty", penalty)


class _Search:
    """The beams of one prompt, and its finished texts, best first."""

    def __init__(
        self, options: BeamSearch, begun: Sequence[int], sampling: Sampling, ends: Sequence[int], most: int
    ) -> None:
        count, penalties = options.num_beams, sampling.penalties
        self.done = False
        self._options, self._ends, self._most = options, set(ends), most
        self._scores = np.full(count, FAR)
        self._scores[0] = 0.0
        self._texts: list[tuple[int, ...]] = [()] * count
        self._rows: list[PenalisedRow] = []
        if not penalties.is_neutral:
            self._rows = [PenalisedRow(penalties, begun, ends) for _ in range(count)]
        self._finished: list[tuple[float, tuple[int, ...]]] = []

    def advance(self, logits: Array) -> tuple[list[int], list[int]]:
        """Continue all beams by an id, from logits f[beams, V]: for each new beam the one that it continues, and its id."""
        scores = np.stack([_log_softmax(row) for row in logits])
        if self._rows:
            scores = np.stack([row.scores(found) for row, found in zip(self._rows, scores)])
        count, vocabulary = scores.shape
        total = (scores + self._scores[:, None]).reshape(-1)
        candidates = _largest(total, max(2, 1 + len(self._ends)) * count)
        length = len(self._texts[0]) + 1
        going: list[tuple[float, int, int]] = []
        for place, candidate in enumerate(candidates):
            beam, item = divmod(int(candidate), vocabulary)
            if item not in self._ends and length < self._most:
                going.append((float(total[candidate]), beam, item))
            elif place < count:
                worth = float(total[candidate]) / length**self._options.length_penalty
                self._finished.append((worth, (*self._texts[beam], item)))
        self._finished = sorted(self._finished, key=lambda found: -found[0])[:count]
        going = going[:count]
        self.done = len(going) < count or self._is_over(going[0][0], length)
        if self.done:
            return list(range(count)), [0] * count
        parents = [beam for _, beam, _ in going]
        ids = [item for _, _, item in going]
        self._scores = np.array([score for score, _, _ in going])
        self._texts = [(*self._texts[beam], item) for _, beam, item in going]
        if self._rows:
            self._rows = [self._rows[beam].continued(item) for _, beam, item in going]
        return parents, ids

    def best(self, count: int) -> list[tuple[int, ...]]:
        """The best finished texts, with the id that ended them."""
        return [text for _, text in self._finished[:count]]

    def _is_over(self, best: float, length: int) -> bool:
        """Whether what goes on, the best of it with the score `best`, is no longer looked at."""
        if len(self._finished) < self._options.num_beams:
            return False
        if self._options.early_stopping is True:
            return True
        longest = self._options.early_stopping == NEVER and self._options.length_penalty > 0
        worth = best / (self._most if longest else length) ** self._options.length_penalty
        return bool(worth <= self._finished[-1][0])


class BeamLoop:
    """One generation by beam search: iterate for the ids i64[rows] of each position of the `each` best texts of each prompt, one
    prompt after the other, as over a `DecodeLoop`. The search is over before the first ids come."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        eos_ids: Sequence[int],
        row_inputs: Mapping[str, Array],
        start_id: int | None,
        pad_id: int,
        each: int,
        search: BeamSearch,
    ) -> None:
        """The rows of `row_inputs` are those of the prompts."""
        self._decoder, self._beams, self._each, self._most = decoder, search.num_beams, each, max_new_tokens
        self._ends = list(eos_ids)
        rows = [prompt for prompt in prompts for _ in range(self._beams)]
        inputs = {name: value.repeat(self._beams, 0) for name, value in row_inputs.items()}
        others = {spec.name for spec in decoder.cache.others}
        self._row_inputs = {name: value for name, value in inputs.items() if name in others}
        self._encoder_feeds: Mapping[str, Array] = {}
        if decoder.encoder_inputs:
            self._encoder_feeds = encoder_feeds(decoder.encoder_inputs, rows, inputs, pad_id)
        begun = beginnings(decoder, prompts, start_id)
        self._tokens, self._mask = pad([text for text in begun for _ in range(self._beams)], pad_id)
        self._searches = [_Search(search, text, sampling, eos_ids, max_new_tokens) for text in begun]
        self.done = np.zeros(len(prompts) * each, bool)
        self.speed = Speed(prompt_tokens=sum(map(len, prompts)))

    def __iter__(self) -> Iterator[Array]:
        self._run()
        texts = [text for search in self._searches for text in search.best(self._each)]
        lengths = np.array([len(text) for text in texts])
        for place in range(int(lengths.max())):
            picked = np.array([text[place] if place < len(text) else 0 for text in texts], np.int64)
            self.done |= (lengths <= place) | np.isin(picked, self._ends)
            yield picked

    def _run(self) -> None:
        """Search until all prompts are done."""
        begin, tokens, mask = time.perf_counter(), self._tokens, self._mask
        most = tokens.shape[1] + self._most
        state, logits = prompts_read(
            self._decoder, self._encoder_feeds, tokens, mask, self._row_inputs, self._beams, most
        )
        self.speed.prefill_seconds, begin = time.perf_counter() - begin, time.perf_counter()
        while True:
            parents, tokens = np.arange(len(tokens)), np.zeros((len(tokens), 1), np.int64)
            for first, search in zip(range(0, len(tokens), self._beams), self._searches):
                if not search.done:
                    part = slice(first, first + self._beams)
                    for row in range(first, first + self._beams):
                        likeliest(row, logits[row])
                    own, ids = search.advance(logits[part])
                    parents[part], tokens[part, 0] = first + np.array(own), ids
            if all(search.done for search in self._searches):
                break
            state.reorder(parents)
            mask = np.concatenate([mask, np.ones_like(tokens)], 1)
            logits = state.step(self._feeds(tokens, mask))
            self.speed.new_tokens += sum(not search.done for search in self._searches)
        self.speed.decode_seconds, self.speed.steps = time.perf_counter() - begin, self.speed.new_tokens

    def _feeds(self, tokens: Array, mask: Array) -> dict[str, Array]:
        return step_feeds(self._decoder.cache, tokens, mask, self._row_inputs, [tokens.shape[1] - 1])


def _log_softmax(logits: Array) -> Array:
    """f64[V]"""
    below = logits.astype(np.float64) - float(logits.max())
    found: Array = below - np.log(np.exp(below).sum())
    return found


def _largest(values: Array, count: int) -> Array:
    """The places of the largest values, largest first; of equal ones the first."""
    count = min(count, len(values))
    found = np.argpartition(-values, count - 1)[:count]
    ordered: Array = found[np.lexsort((found, -values[found]))]
    return ordered
