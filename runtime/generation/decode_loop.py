"""The loop of generation: prompts in, ids out one by one, on any engine that has a cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bmgraph.errors import InputError
from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.runtime.generation.sampling import Array, Sampler, Sampling

UNMASKED = (
    "the prompts differ in length, and this model takes no mask that could hide padding: give prompts of one length, or "
    "capture the model with its attention mask"
)


class Steps(Protocol):
    """A cache that fills: one conversation of a batch with its engine."""

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """Read new tokens behind those in the cache; the logits f[B, V] after the last one."""


class Decoder(Protocol):
    """An engine with a cache."""

    @property
    def cache(self) -> CacheSpec:
        """What it takes and gives."""

    @property
    def source(self) -> tuple[TensorSpec, ...]:
        """What its encoder takes; empty where it has none."""

    def begin(self, rows: int, source: Mapping[str, Array]) -> Steps:
        """An empty cache for a batch, whose encoder has read `source`."""


@dataclass
class Speed:
    """What a generation took: tokens read and made, padding not counted, and the seconds of both."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def prefill(self) -> float:
        """Tokens of the prompts read in a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode(self) -> float:
        """Tokens made in a second, over all rows, the first of each row left out: reading the prompt made it."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0


class Run:
    """One generation: iterate for the ids i64[B] of each step. `done` says which rows have ended (their ids mean nothing);
    the caller may end rows by setting it."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        most: int,
        sampling: Sampling,
        ends: Sequence[int],
        others: Mapping[str, Array],
        start: int | None = None,
    ) -> None:
        self._decoder, self._most, self._ends = decoder, most, np.array(list(ends), np.int64)
        self._sampler = Sampler(sampling, len(prompts))
        self._others = dict(others)
        self._source: dict[str, Array] = {}
        if decoder.source:
            self._source = read_source(decoder.source, prompts)
            self._tokens = np.full((len(prompts), 1), start, np.int64)
            self._mask = np.ones_like(self._tokens)
        else:
            self._tokens, self._mask = pad(prompts)
        self.done = np.zeros(len(prompts), bool)
        self.speed = Speed(prompt_tokens=sum(map(len, prompts)))

    def __iter__(self) -> Iterator[Array]:
        begin = time.perf_counter()
        steps = self._decoder.begin(len(self.done), self._source)
        logits = steps.step(self._feeds(self._tokens))
        self.speed.prefill_seconds = time.perf_counter() - begin
        for count in range(self._most):
            picked = self._sampler.pick(logits)
            self.done |= np.isin(picked, self._ends)
            yield picked
            if self.done.all() or count + 1 == self._most:
                return
            begin = time.perf_counter()
            self._mask = np.concatenate([self._mask, np.ones((len(picked), 1), np.int64)], 1)
            logits = steps.step(self._feeds(picked[:, None]))
            self.speed.decode_seconds += time.perf_counter() - begin
            self.speed.new_tokens += int((~self.done).sum())

    def _feeds(self, tokens: Array) -> dict[str, Array]:
        cache = self._decoder.cache
        feeds: dict[str, Array] = {cache.tokens.name: tokens, **self._others}
        if cache.mask is not None:
            feeds[cache.mask.name] = self._mask
        if cache.positions is not None:
            places = np.maximum(self._mask.cumsum(1) - 1, 0)
            feeds[cache.positions.name] = places[:, -tokens.shape[1] :]
        return feeds


def pad(prompts: Sequence[Sequence[int]], behind: bool = False) -> tuple[Array, Array]:
    """Prompts as ids and mask i64[B, S], with padding in front of the shorter ones, or behind them."""
    longest = max(map(len, prompts))
    tokens = np.zeros((len(prompts), longest), np.int64)
    mask = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        begin = 0 if behind else longest - len(prompt)
        tokens[row, begin : begin + len(prompt)] = prompt
        mask[row, begin : begin + len(prompt)] = 1
    return tokens, mask


def read_source(source: tuple[TensorSpec, ...], prompts: Sequence[Sequence[int]]) -> dict[str, Array]:
    """The inputs of an encoder for prompts: ids, and a mask where it takes one.

    Raises InputError for an encoder of something else than ids.
    """
    ids, mask = pad(prompts, behind=True)
    masks = [spec for spec in source if "mask" in spec.name]
    others = [spec for spec in source if spec not in masks]
    if len(others) != 1 or len(masks) > 1 or len(others[0].shape) != 2 or others[0].dtype.is_floating_point:
        raise InputError(
            f"the encoder takes {', '.join(map(str, source))}: prompts can only be given to one of ids"
        )
    if not masks and not mask.all():
        raise InputError(UNMASKED)
    return {others[0].name: ids, **{spec.name: mask for spec in masks}}


def check_prompts(decoder: Decoder, prompts: Sequence[Sequence[int]], most: int) -> None:
    """Raise InputError for what a decoder cannot continue, naming the prompt."""
    cache = decoder.cache
    if not prompts:
        raise InputError("no prompt was given")
    if most < 1:
        raise InputError(f"max_new_tokens={most}: give at least 1")
    for number, prompt in enumerate(prompts):
        check_ids(prompt, cache.vocabulary, number)
    if decoder.source:
        if cache.limit is not None and most > cache.limit:
            raise InputError(f"max_new_tokens={most} is more than the {cache.limit} positions of this model")
        return
    for number, prompt in enumerate(prompts):
        if cache.limit is not None and len(prompt) + most > cache.limit:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens, with max_new_tokens={most} more than the {cache.limit} positions "
                "of this model: shorten it, or ask for fewer"
            )
    if cache.mask is None and len(set(map(len, prompts))) > 1:
        raise InputError(UNMASKED)


def check_ids(prompt: Sequence[int], vocabulary: int, number: int) -> None:
    """Raise InputError for an empty prompt and for ids outside of the vocabulary."""
    if not len(prompt):
        raise InputError(f"prompt {number} is empty: give at least one token")
    for item in prompt:
        if not isinstance(item, (int, np.integer)) or isinstance(item, bool):
            raise InputError(f"prompt {number} holds {item!r}: give text, or ids as whole numbers")
        if not 0 <= item < vocabulary:
            raise InputError(f"prompt {number} has id {item}: the vocabulary has ids 0 to {vocabulary - 1}")
