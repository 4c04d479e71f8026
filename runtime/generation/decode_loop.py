"""The decode loop: prefill a KV cache with the prompts, then feed one new token per row and step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from bmgraph.errors import InputError
from bmgraph.ir.cache_spec import CacheSpec, id_count
from bmgraph.ir.input_kind import MASKS, InputKind
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.runtime.generation.logprobs import IdScore
from bmgraph.runtime.generation.option_checks import shown
from bmgraph.runtime.generation.sampling import Array, Constraint, Sampler, Sampling
from bmgraph.runtime.generation.sliding_window import SlidingWindow, WindowedTexts
from bmgraph.utils.memory_budget import free_memory

_NEEDS_MASK = (
    "the prompts differ in length, and this model takes no mask that could hide padding: give prompts of one length, or "
    "capture the model with its attention mask"
)

MOST_NEW_TOKENS = 2**31 - 1
"""The largest length that engines count; also of models without a bound on positions."""


class DecodeState(Protocol):
    """The KV cache of one batch, which grows at every step."""

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """Append new tokens to the cache; returns the logits f[B, V] after the last one, in memory that the next step may overwrite."""

    def reorder(self, rows: Array) -> None:
        """Let each row go on with the cache of another one: row i with that of rows[i], i64[B]. Both have the same encoder outputs."""


@runtime_checkable
class RepeatingState(DecodeState, Protocol):
    """A cache without encoder outputs whose rows may be continued in several ways, so that each prompt is read once."""

    def repeat_rows(self, each: int) -> None:
        """Let each row be followed by `each` - 1 others that hold what it holds."""


class Decoder(Protocol):
    """An engine with a KV cache, as far as the decode loop uses it."""

    @property
    def cache(self) -> CacheSpec:
        """The decoder's signature."""

    @property
    def encoder_inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs of what gives the decoder's memories, such as an encoder; empty without one."""

    def start(self, batch_size: int, encoder_feeds: Mapping[str, Array], most: int) -> DecodeState:
        """An empty cache for a batch, whose rows will have `most` positions at most; the encoder, if there is one, runs on
        `encoder_feeds`."""


@dataclass
class Speed:
    """Token counts (without padding) and wall-clock seconds of one generation, for prefill and decoding.

    `steps` are those of each row, `drafted` the ids that were guessed ahead for them, `accepted` those of them that were right.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def prefill(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode(self) -> float:
        """New tokens per second over all rows, without the first of each row, which prefill produces."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def per_step(self) -> float:
        """New tokens of a row for each of its steps: 1, or more where ids were guessed ahead."""
        return self.new_tokens / self.steps if self.steps else 0.0


class Loop(Protocol):
    """One generation: iterate for the ids i64[B] of each position. `done` marks rows that have ended, as in `DecodeLoop`."""

    done: Array
    speed: Speed

    def __iter__(self) -> Iterator[Array]:
        """The ids of the rows, one each."""


class DecodeLoop:
    """One generation: iterate for the ids i64[B] of each step.

    `done` marks rows that have ended, whose further ids have no meaning; the caller may set it to end rows early.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        eos_ids: Sequence[int],
        row_inputs: Mapping[str, Array],
        start_id: int | None = None,
        pad_id: int = 0,
        each: int = 1,
        logprobs: int | None = None,
        choosing: Sequence[Constraint] = (),
        window: SlidingWindow | None = None,
    ) -> None:
        """`each`: so many rows, one after the other, are of one prompt. `logprobs`, `choosing`: as of `Sampler`. `window`: what rows read of
        texts that are longer; penalties and stops go by whole texts."""
        self._decoder, self._max_new_tokens, self._each = decoder, max_new_tokens, each
        self._window, self._pad_id = window, pad_id
        self._texts: WindowedTexts | None = None
        self._eos_ids = np.array(list(eos_ids), np.int64)
        begun = beginnings(decoder, prompts, start_id)
        self._sampler = Sampler(sampling, len(prompts), begun, eos_ids, each, logprobs, choosing=choosing)
        others = {spec.name for spec in decoder.cache.others}
        self._row_inputs = {name: value for name, value in row_inputs.items() if name in others}
        self._encoder_feeds: dict[str, Array] = {}
        if decoder.encoder_inputs:
            self._encoder_feeds = encoder_feeds(decoder.encoder_inputs, prompts, row_inputs, pad_id)
            self._tokens = np.full((len(prompts), 1), start_id, np.int64)
            self._mask = np.ones_like(self._tokens)
        else:
            self._texts = None if window is None else WindowedTexts(window, prompts)
            self._tokens, self._mask = pad(prompts if self._texts is None else self._texts.rows, pad_id)
        self.done = np.zeros(len(prompts), bool)
        self.speed = Speed(prompt_tokens=sum(map(len, prompts)))

    def __iter__(self) -> Iterator[Array]:
        begin = time.perf_counter()
        state, logits = self._read(self._each, self._max_new_tokens)
        self.speed.prefill_seconds = time.perf_counter() - begin
        for count in range(self._max_new_tokens):
            picked = self._sampler.pick(logits)
            self.done |= np.isin(picked, self._eos_ids)
            yield picked
            if self.done.all() or count + 1 == self._max_new_tokens:
                return
            begin = time.perf_counter()
            if self._texts is not None and self._texts.add(picked):
                del state, logits  # the cache that is full goes before the next one is made
                self._texts.slide(self.done, ragged=self._decoder.cache.mask is not None)
                self._tokens, self._mask = pad(self._texts.rows, self._pad_id)
                state, logits = self._read(1, self._max_new_tokens - count - 1)
            else:
                self._mask = np.concatenate([self._mask, np.ones((len(picked), 1), np.int64)], 1)
                logits = state.step(self._feeds(picked[:, None]))
            self.speed.decode_seconds += time.perf_counter() - begin
            self.speed.new_tokens += int((~self.done).sum())
            self.speed.steps = self.speed.new_tokens

    def scored(self, row: int) -> IdScore | None:
        """The score of the id that a row got last; None if scores are not wanted."""
        return self._sampler.scored(row)

    def _read(self, each: int, new: int) -> tuple[DecodeState, Array]:
        """A cache that holds the tokens, for so many new ones, and the logits after them; `each` rows are of one prompt."""
        held = self._tokens.shape[1]
        most = held + new if self._window is None else self._window.positions(held, new)
        return prompts_read(
            self._decoder, self._encoder_feeds, self._tokens, self._mask, self._row_inputs, each, most
        )

    def _feeds(self, tokens: Array) -> dict[str, Array]:
        return step_feeds(self._decoder.cache, tokens, self._mask, self._row_inputs, [tokens.shape[1] - 1])


def prompts_read(
    decoder: Decoder,
    encoder_feeds: Mapping[str, Array],
    tokens: Array,
    mask: Array,
    row_inputs: Mapping[str, Array],
    each: int,
    most: int,
) -> tuple[DecodeState, Array]:
    """A cache that holds what rows begin with, ids and mask i64[B, S], and the logits f[B, V] after it. Rows may have `most` positions;
    `each` of them, one after the other, begin alike, and that is read once where the cache can be repeated."""
    scored = [tokens.shape[1] - 1]
    if each > 1 and not decoder.encoder_inputs:
        state = decoder.start(len(tokens) // each, encoder_feeds, most)
        if isinstance(state, RepeatingState):
            own = {name: value[::each] for name, value in row_inputs.items()}
            logits = state.step(step_feeds(decoder.cache, tokens[::each], mask[::each], own, scored))
            found: Array = logits.repeat(each, 0)
            state.repeat_rows(each)
            return state, found
    state = decoder.start(len(tokens), encoder_feeds, most)
    return state, state.step(step_feeds(decoder.cache, tokens, mask, row_inputs, scored))


def beginnings(
    decoder: Decoder, prompts: Sequence[Sequence[int]], start_id: int | None
) -> Sequence[Sequence[int]]:
    """The ids that the decoder reads first for each prompt: the prompt's own, or behind an encoder the id that it starts with."""
    return [[start_id]] * len(prompts) if decoder.encoder_inputs and start_id is not None else prompts


def step_feeds(
    cache: CacheSpec,
    tokens: Array,
    mask: Array,
    row_inputs: Mapping[str, Array],
    scored: Sequence[int],
    ends: Array | None = None,
) -> dict[str, Array]:
    """The inputs of a step that appends ids i[B, S]: `mask` i64[B, P + S] is 0 at padding, `scored` are the new positions whose logits
    are wanted. `ends` i64[B]: where the one new id of each row stands, of rows that end apart."""
    feeds: dict[str, Array] = {cache.tokens.name: _as(cache.tokens, tokens), **row_inputs}
    if cache.mask is not None:
        feeds[cache.mask.name] = _as(cache.mask, mask)
    if cache.positions is not None:
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        feeds[cache.positions.name] = _as(cache.positions, positions[:, -tokens.shape[1] :])
    if cache.extent is not None:
        feeds[cache.extent.name] = _as(cache.extent, np.zeros((1, mask.shape[1]), np.uint8))
    if cache.scored is not None:
        feeds[cache.scored.name] = np.array(scored, np.int64)
    if ends is not None:
        assert cache.ends is not None
        feeds[cache.ends] = ends.astype(np.int32)
    return feeds


def _as(spec: TensorSpec, values: Array) -> Array:
    """Values in the type that an input takes."""
    found: Array = values.astype(torch.empty(0, dtype=spec.dtype).numpy().dtype, copy=False)
    return found


def pad(prompts: Sequence[Sequence[int]], pad_id: int = 0, right: bool = False) -> tuple[Array, Array]:
    """Prompts as ids and mask i64[B, S], padded on the left (for a decoder) or on the right (for an encoder)."""
    longest = max(map(len, prompts))
    tokens = np.full((len(prompts), longest), pad_id, np.int64)
    mask = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        begin = 0 if right else longest - len(prompt)
        tokens[row, begin : begin + len(prompt)] = prompt
        mask[row, begin : begin + len(prompt)] = 1
    return tokens, mask


def encoder_feeds(
    inputs: tuple[TensorSpec, ...],
    prompts: Sequence[Sequence[int]],
    row_inputs: Mapping[str, Array],
    pad_id: int = 0,
    behind: int = 0,
) -> dict[str, Array]:
    """An encoder's inputs for prompts: ids, a mask if it takes one, and its inputs with one value per prompt. `behind`: so many
    positions of padding stand behind the longest prompt.

    Raises InputError if the encoder takes anything else.
    """
    given = {spec.name: row_inputs[spec.name] for spec in inputs if spec.name in row_inputs}
    inputs = tuple(spec for spec in inputs if spec.name not in given)
    ids, mask = pad(prompts, pad_id, right=True)
    ids = np.pad(ids, ((0, 0), (0, behind)), constant_values=pad_id)
    mask = np.pad(mask, ((0, 0), (0, behind)))
    masks = [spec for spec in inputs if spec.kind in MASKS]
    others = [spec for spec in inputs if spec not in masks]
    if len(others) != 1 or len(masks) > 1 or len(others[0].shape) != 2 or others[0].dtype.is_floating_point:
        raise InputError(
            f"the encoder takes {', '.join(map(str, inputs))}: generation needs an encoder that takes ids [B, S] "
            "and at most one mask"
        )
    if not masks and not mask.all():
        raise InputError(_NEEDS_MASK)
    marked = {
        spec.name: _as(spec, 1 - mask if spec.kind is InputKind.INVERSE_MASK else mask) for spec in masks
    }
    return {others[0].name: _as(others[0], ids), **marked, **given}


def check_prompts(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    window: SlidingWindow | None = None,
) -> None:
    """Raise InputError, naming the prompt, unless the decoder can continue all prompts, within its positions or a window that slides."""
    cache = decoder.cache
    if not prompts:
        raise InputError("no prompt was given")
    if not 1 <= max_new_tokens <= MOST_NEW_TOKENS:
        bound = "at least 1" if max_new_tokens < 1 else f"at most {MOST_NEW_TOKENS}"
        raise InputError(f"max_new_tokens={shown(max_new_tokens)}: give {bound}")
    vocabulary, soft = cache.vocabulary, cache.soft_tokens
    for spec in decoder.encoder_inputs:
        if len(spec.shape) == 2 and spec.kind not in MASKS:  # an input of one value per row chooses a delta
            vocabulary = id_count(spec, vocabulary)
            soft = 0 if spec.values is None else max(0, -spec.values[0])
    for index, prompt in enumerate(prompts):
        check_ids(prompt, vocabulary, index, soft)
    if decoder.encoder_inputs:
        if cache.limit is not None and max_new_tokens > cache.limit:
            raise InputError(
                f"max_new_tokens={max_new_tokens} is more than the {cache.limit} positions of this model"
            )
        return
    for index, prompt in enumerate(prompts):
        if window is None and cache.limit is not None and len(prompt) + max_new_tokens > cache.limit:
            raise InputError(
                f"prompt {index} has {len(prompt)} tokens, with max_new_tokens={max_new_tokens} more than the "
                f"{cache.limit} positions of this model: shorten the prompt, lower max_new_tokens, or let the oldest tokens go "
                "(window=True, --window 0)"
            )
    if cache.mask is None and len(set(map(len, prompts))) > 1:
        raise InputError(_NEEDS_MASK)


def check_memory(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    each: int,
    window: SlidingWindow | None = None,
) -> None:
    """Raise InputError where a cache without a bound on positions could outgrow the memory that is free, with `each` rows a prompt."""
    if decoder.cache.limit is not None or decoder.encoder_inputs:
        return
    longest, rows = max(map(len, prompts)), len(prompts) * each
    most = longest + max_new_tokens if window is None else window.positions(longest, max_new_tokens)
    position, free = rows * decoder.cache.bytes_of_position, free_memory()
    if most * position > free:
        raise InputError(
            f"max_new_tokens={max_new_tokens}: this model has no bound on positions, and the KV cache of {most} of them "
            f"in {rows} rows may take {most * position / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free: give at most "
            f"{max(0, free // position - longest)}, or {'let the oldest tokens go (window=)' if window is None else 'a smaller window='}"
        )


def check_ids(prompt: Sequence[int], vocabulary: int, index: int, soft: int = 0) -> None:
    """Raise InputError for an empty prompt and for ids outside the vocabulary, below which `soft` trained tokens have ids; `index` is
    the prompt's number."""
    if not len(prompt):
        raise InputError(f"prompt {index} is empty: give at least one token")
    for item in prompt:
        if not isinstance(item, (int, np.integer)) or isinstance(item, bool):
            raise InputError(f"prompt {index} holds {shown(item)}: give text or integer ids")
        if not -soft <= item < vocabulary:
            below = f", and soft tokens have -1 to {-soft}" if soft else ""
            raise InputError(
                f"prompt {index} has id {shown(item)}: the vocabulary has ids 0 to {vocabulary - 1}{below}"
            )
