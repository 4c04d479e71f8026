"""What a model writes for the rows of a task, and how near it is to what it should write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bmgraph.backends.torch.backend import Torch
from bmgraph.compiler import compile as compile_model
from bmgraph.errors import InputError
from bmgraph.pass_manager.run_settings import Verify
from bmgraph.prompting.generate import Generate
from bmgraph.prompting.rows import Row
from bmgraph.prompting.text_measures import FIGURES, TextMeasures
from bmgraph.runtime.training.run_measure import RunMeasure

if TYPE_CHECKING:
    from bmgraph.ir.program import Program
    from bmgraph.runtime.torch.engine import TorchEngine
    from bmgraph.runtime.training.trainer import Trainer

EXACT = "exact"

AT_ONCE = 32
"""Rows that are continued at once."""


class WrittenTexts(RunMeasure):
    """Measures the texts that a trainer's program writes for rows, each up to `max_new_tokens` tokens, greedily.

    `scores`: as `TextMeasures.of` takes them. Raises InputError for rows without a target, and for unknown scores.
    """

    def __init__(
        self, task: Generate, rows: Sequence[Row], scores: Sequence[str], max_new_tokens: int, verify: Verify
    ) -> None:
        self._task, self._rows, self._scores = task, list(rows), tuple(scores)
        self._tokens, self._verify = max_new_tokens, verify
        expected = task.expected(rows)
        TextMeasures.of(expected, expected, scores)  # a score that is not known or not installed is told now
        self.names = (EXACT, *(figure for name in scores for figure in FIGURES[name]))

    def of(self, trainer: Trainer) -> Mapping[str, float]:
        """The figures of a trainer's program."""
        found = self.of_engine(generator(trainer.program(), self._task, self._verify))
        return {EXACT: found.exact, **found.scores}

    def of_engine(self, engine: TorchEngine) -> TextMeasures:
        """The measures of the texts that an engine writes."""
        return measured_texts(engine, self._task, self._rows, self._scores, self._tokens)


def generator(program: Program, task: Generate, verify: Verify) -> TorchEngine:
    """An engine with a KV cache that holds the task."""
    engine: TorchEngine = compile_model(
        program, backend=Torch(generate=True), resources={"task": task}, verify=verify
    )
    return engine


def measured_texts(
    engine: TorchEngine, task: Generate, rows: Sequence[Row], scores: Sequence[str], max_new_tokens: int
) -> TextMeasures:
    """The measures of what an engine writes for rows."""
    return TextMeasures.of(written(engine, task, rows, max_new_tokens), task.expected(rows), scores)


def written(engine: TorchEngine, task: Generate, rows: Sequence[Row], max_new_tokens: int) -> list[str]:
    """The texts that an engine with the task's tokenizer writes for rows, without space around them. Raises InputError where prompts leave no room."""
    texts: list[str] = []
    longest, eos = _room(engine, task, max_new_tokens), task.vocabulary.special_id("eos")
    assert eos is not None
    for first in range(0, len(rows), AT_ONCE):
        prompts = task.prompts(rows[first : first + AT_ONCE], longest)
        found = engine.generate(prompts, max_new_tokens=max_new_tokens, eos=eos, start=task.maker.start)
        texts += [text.strip() for text in found]
    return texts


def _room(engine: TorchEngine, task: Generate, max_new_tokens: int) -> int | None:
    """The longest prompt that leaves room for new tokens; None where there is no bound."""
    decoder = engine.decoder()
    assert decoder is not None
    limit = decoder.cache.limit
    if task.model != "decoder" or limit is None:
        return None
    if limit <= max_new_tokens:
        raise InputError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the {limit} positions of this model"
        )
    return limit - max_new_tokens
