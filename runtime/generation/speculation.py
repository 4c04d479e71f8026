"""Speculative decoding: a step reads ids that were guessed ahead, and keeps those that would have been chosen anyway.

Source: Stern et al. 2018 (arXiv:1811.03115), Leviathan et al. 2023 (arXiv:2211.17192); guesses come from the text itself
(`prompt_lookup.py`). Kernels give other bits for one position than for several, so the reference is the same engine in steps of
two positions, of which the second is a filling: `speculate=0`. Ids are chosen one by one from logits that have its bits, by the
row's own penalties and random generator, so they are those of the reference whatever is guessed, also when they are drawn.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bmgraph.errors import InputError
from bmgraph.runtime.generation.decode_loop import Decoder, Speed, beginnings, encoder_feeds
from bmgraph.runtime.generation.draft_length import COSTS, DraftLength
from bmgraph.runtime.generation.option_checks import shown, whole_number
from bmgraph.runtime.generation.prompt_lookup import Draft, PromptLookup
from bmgraph.runtime.generation.sampling import Array, Sampler, Sampling
from bmgraph.runtime.generation.speculated_row import RewindingDecoder, SpeculatedRow
from bmgraph.runtime.generation.step_sizes import PAIR, has_equal_bits, room_to_compare

MOST_DRAFTS = max(COSTS) - 1
"""How many ids a step guesses at most."""


def draft_count(given: bool | int | None) -> int | None:
    """How many ids a step may guess; None for decoding without speculation. Raises InputError for another value."""
    if given is None or given is False:
        return None
    count = MOST_DRAFTS if given is True else whole_number("speculate", given)
    if not 0 <= count <= MOST_DRAFTS:
        raise InputError(
            f"speculate={shown(given)}: give True, or how many ids a step may guess, 0 to {MOST_DRAFTS} (0: none, as the reference does)"
        )
    return count


def rewinding(decoder: Decoder) -> RewindingDecoder:
    """The decoder, if it can take back what was guessed wrong. Raises InputError if it cannot."""
    reason = unable(decoder)
    if reason:
        raise InputError(f"speculate: this engine cannot take back what was guessed wrong: {reason}")
    assert isinstance(decoder, RewindingDecoder)
    return decoder


def unable(decoder: Decoder) -> str:
    """Why a decoder cannot take back what was guessed wrong; empty if it can."""
    if isinstance(decoder, RewindingDecoder):
        return decoder.no_rewinding
    return "compile for ONNX Runtime, as in Onnx(generate=True)"


class SpeculativeLoop:
    """One generation, row by row: iterate for the ids i64[B] of each position, as over a `DecodeLoop`.

    Each row has a cache of its own and gets the ids that it gets alone; it takes a step when it has no ids left to give.
    """

    def __init__(
        self,
        decoder: RewindingDecoder,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        eos_ids: Sequence[int],
        row_inputs: Mapping[str, Array],
        start_id: int | None = None,
        pad_id: int = 0,
        each: int = 1,
        drafts: int = MOST_DRAFTS,
    ) -> None:
        """`drafts`: how many ids a step may guess; the rest as for `DecodeLoop`."""
        self._decoder, self._row_inputs = decoder, row_inputs
        self._prompts = prompts
        self._max_new_tokens, self._drafts, self._pad_id = max_new_tokens, drafts, pad_id
        self._eos_ids = np.array(list(eos_ids), np.int64)
        self._begun = beginnings(decoder, prompts, start_id)
        self._sampler = Sampler(sampling, len(prompts), self._begun, eos_ids, each)
        self._lookups = [PromptLookup(prompt, decoder.cache.vocabulary) for prompt in prompts]
        self._length = DraftLength()
        self.done = np.zeros(len(prompts), bool)
        self.speed = Speed(prompt_tokens=sum(map(len, prompts)))

    def __iter__(self) -> Iterator[Array]:
        begin = time.perf_counter()
        rows = [self._row(row) for row in range(len(self._prompts))]
        for row in rows if self._drafts else ():
            self._is_equal(row, PAIR)
        self.speed.prefill_seconds = time.perf_counter() - begin
        for count in range(self._max_new_tokens):
            picked = np.zeros(len(rows), np.int64)
            going = np.flatnonzero(~self.done)
            for index in going:
                begin = time.perf_counter()
                if not rows[index].ready:
                    self._step(rows[index], self._lookups[index], self._max_new_tokens - count)
                self.speed.decode_seconds += time.perf_counter() - begin
                picked[index] = self._choose(int(index), rows[index])
            self.speed.new_tokens += len(going) if count else 0
            self.done |= np.isin(picked, self._eos_ids)
            yield picked
            if self.done.all():
                return

    def _row(self, index: int) -> SpeculatedRow:
        """A row whose prompt is read."""
        decoder = self._decoder
        own = {name: value[index : index + 1] for name, value in self._row_inputs.items()}
        others = {spec.name for spec in decoder.cache.others}
        fed: Mapping[str, Array] = {}
        if decoder.encoder_inputs:
            fed = encoder_feeds(decoder.encoder_inputs, [self._prompts[index]], own, self._pad_id)
        begun = self._begun[index]
        state = decoder.start(1, fed, len(begun) + self._max_new_tokens)
        read = {name: value for name, value in own.items() if name in others}
        return SpeculatedRow(state, decoder.cache, begun, read)

    def _step(self, row: SpeculatedRow, lookup: PromptLookup, left: int) -> None:
        """A step of a row that may still give `left` ids."""
        draft, size = self._planned(row, lookup.draft(min(self._drafts, left - 1)))
        self.speed.steps += 1
        self.speed.drafted += row.step(draft, size)

    def _planned(self, row: SpeculatedRow, draft: Draft) -> tuple[Draft, int]:
        """What a step may read of a draft, and its size: one that has the reference's bits."""
        sizes = [size for size in COSTS if row.room is None or size <= row.room]
        while draft.ids and sizes:
            size = self._length.choose(draft.certainty, sizes, len(draft.ids))
            if self._is_equal(row, size):
                return draft, size
            sizes.remove(size)
        return Draft(), PAIR

    def _is_equal(self, row: SpeculatedRow, size: int) -> bool:
        """Whether steps of a size have the reference's bits: compared once for each value of a row's inputs, where there is room."""
        known = self._decoder.equal_sizes.setdefault(row.inputs, {})
        if size not in known:
            if row.room is not None and row.room < room_to_compare(size):
                return False
            known[size] = has_equal_bits(row, size, self._decoder.cache.vocabulary)
        return known[size]

    def _choose(self, index: int, row: SpeculatedRow) -> int:
        """The next id of a row, from logits that are known."""
        item = self._sampler.pick_one(index, row.scores)
        guesses = row.choose(item)
        if guesses is not None:
            self.speed.accepted += guesses.right
            self._length.note(guesses.certainty, guesses.right, guesses.wrong)
        self._lookups[index].add(item)
        return item
