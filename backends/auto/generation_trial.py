"""What engines that generate are timed on: prompts of the example's size, and some new tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from bmgraph.runtime.engine_base import Engine
from bmgraph.runtime.generation.generate import GeneratingEngine

NEW = 32
"""New tokens of a row, as far as the model has positions for them."""


def generations(
    engines: Mapping[str, Engine],
) -> tuple[dict[str, Callable[[], object]], dict[str, torch.Tensor], int] | None:
    """A generation by each engine, all of the same prompts, these by a name that says what is timed, and the number of new tokens of a
    row; None where an engine does not generate, or takes inputs whose values only its user knows.

    Prompts have random ids, and as many rows and positions as the example. Nothing ends a row.
    """
    trials = {name: _Trial.of(engine) for name, engine in engines.items()}
    first = next(iter(trials.values()))
    if first is None or any(trial is None for trial in trials.values()):
        return None
    prompts = first.prompts()
    calls = {name: trial.call(prompts, first.new) for name, trial in trials.items() if trial is not None}
    return calls, {f"{first.new} new tokens behind": prompts}, first.new


class _Trial:
    """A generation by one engine, of `new` tokens for prompts of `shape`."""

    def __init__(
        self, engine: GeneratingEngine, shape: tuple[int, int], vocabulary: int, new: int, start: int | None
    ) -> None:
        self.engine, self.shape, self.vocabulary, self.new, self.start = engine, shape, vocabulary, new, start

    @staticmethod
    def of(engine: Engine) -> _Trial | None:
        """The trial of an engine, on its example."""
        decoder = engine.decoder() if isinstance(engine, GeneratingEngine) else None
        if decoder is None or not isinstance(engine, GeneratingEngine):
            return None
        cache, feeding = decoder.cache, decoder.encoder_inputs
        if any(not spec.names for spec in (*cache.others, *feeding) if len(spec.shape) == 1):
            return None
        ids = next((spec.name for spec in feeding if len(spec.shape) == 2), cache.tokens.name)
        example = engine.example.get(ids, engine.example.get(cache.tokens.name))
        if example is None:
            return None
        rows, length = example.shape
        slot = cache.slots[0]
        if not feeding and slot.past.name in engine.example:
            length += engine.example[slot.past.name].shape[slot.axis]
        start = 0 if feeding and engine.generation.start is None else None
        if cache.limit is not None and not feeding:
            length = min(length, max(1, cache.limit // 2))
        new = NEW if cache.limit is None else min(NEW, cache.limit - (0 if feeding else length))
        return _Trial(engine, (rows, length), cache.vocabulary, new, start)

    def prompts(self) -> torch.Tensor:
        """Random ids i64[B, S]."""
        return torch.randint(self.vocabulary, self.shape, generator=torch.Generator().manual_seed(0))

    def call(self, prompts: torch.Tensor, new: int) -> Callable[[], object]:
        """Generate behind the prompts."""
        return lambda: self.engine.generate(prompts, max_new_tokens=new, eos=(), start=self.start)
