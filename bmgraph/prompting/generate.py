"""Generate: the model writes what stands at the mask of a template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.nn.functional import cross_entropy

from bmgraph.errors import InputError
from bmgraph.prompting.generation_verbalizer import TargetText
from bmgraph.prompting.prompts import ATTENTION, DECODER_IDS, IDS, SEGMENTS, padded
from bmgraph.prompting.rows import Row, rows_of
from bmgraph.prompting.task import Batch, Task, TaskLoss
from bmgraph.prompting.template import MASK, Template

TARGETS, TARGET = "targets", "target"
"""The input that only the loss reads, i64[B, S]: the id that each position is to predict, or -100. The field of a row."""

IGNORED = -100


class Generate(Task):
    """Generation by a template with one mask, at its end for a decoder.

    `prompts` gives what `engine.generate` continues, `batch` of rows with a `target` what a trainer learns from: its tokens, and
    the end of the text. target: what is written for a row, in the language of templates, by default its field `target`. Other
    options: see `Classify`.

    Raises InputError as `Classify` does, for an encoder, and for more than one mask.
    """

    kind: ClassVar[str] = "generate"

    def __init__(
        self,
        template: Template,
        *,
        target: str | None = None,
        model: str = "decoder",
        max_length: int | None = None,
        truncate: str = "tail",
        padding: str | None = None,
        start: int | None = None,
        segments: bool = False,
        names: Mapping[str, str | None] | None = None,
        output: str | None = None,
    ) -> None:
        super().__init__(template, model, max_length, truncate, padding, start, segments, names, output)
        if model == "encoder":
            raise InputError("an encoder writes no text: give model='decoder' or 'encoder-decoder'")
        if template.masks != 1:
            raise InputError(f"the template has {template.masks} masks: give one, where the text is written")
        if self.vocabulary.special_id("eos") is None:
            raise InputError(
                'the tokenizer has no token that ends a text: give Template(..., special={"eos": ...})'
            )
        self.target = None if target is None else TargetText(target)
        mask = next(node for node in template.nodes if node.kind == MASK)
        self._space = " " if mask.space else ""

    @property
    def loss(self) -> TaskLoss:
        """The cross-entropy of the targets' tokens, summed, and their number."""
        return TaskLoss(self._loss, (TARGETS,))

    def prompts(self, rows: Sequence[Row], longest: int | None = None) -> list[list[int]]:
        """The ids of rows that `engine.generate` continues, or that an encoder reads."""
        return [list(prompt.ids) for prompt in self.prompts_of(rows, longest)]

    def batch(self, rows: Sequence[Row], longest: int | None = None) -> Batch:
        """The inputs of rows with a target: ids and attention mask i64[B, S], for an encoder-decoder the decoder's ids i64[B, T],
        and targets i64[B, S] or i64[B, T], which the loss reads. Rows without a target give the inputs of their prompts. Raises InputError where some rows have one."""
        given, end = rows_of(rows), self.vocabulary.special_id("eos")
        assert end is not None
        if self.target is None and not any(isinstance(row, Mapping) and TARGET in row for row in given):
            return self.named(self.maker.batch(self.prompts_of(given, longest), self.padding, self.segments))
        targets = [[*self.vocabulary.ids(self._target(row, index)), end] for index, row in enumerate(given)]
        if not given:
            raise InputError("there are no rows: give at least one")
        limits = [limit for limit in (self.maker.longest, longest) if limit is not None]
        if self.model == "encoder-decoder":
            start = self.maker.start
            assert start is not None
            batch = self._padded(self.prompts(rows, longest))
            batch[DECODER_IDS], _ = padded([[start, *ids[:-1]] for ids in targets], self.vocabulary, "right")
            wanted, _ = padded(targets, self.vocabulary, "right", IGNORED)
            return {**self.named(batch), TARGETS: wanted}
        prompts = []
        for index, (row, ids) in enumerate(zip(given, targets)):
            room = min(limits) - len(ids) if limits else None
            prompts.append(list(self.maker.prompt(row, index, room).ids))
        batch = self._padded([[*prompt, *ids] for prompt, ids in zip(prompts, targets)])
        labels = [[*[IGNORED] * (len(prompt) - 1), *ids, IGNORED] for prompt, ids in zip(prompts, targets)]
        wanted, _ = padded(labels, self.vocabulary, self.padding, IGNORED)
        return {**self.named(batch), TARGETS: wanted}

    def _padded(self, rows: Sequence[Sequence[int]]) -> Batch:
        batch = dict(zip((IDS, ATTENTION), padded(rows, self.vocabulary, self.padding)))
        if self.segments:
            batch[SEGMENTS] = torch.zeros_like(batch[IDS])
        return batch

    def _target(self, row: Row, index: int) -> str:
        if self.target is not None:
            return self._space + self.target.of(row, index)
        if isinstance(row, str) or not isinstance(row.get(TARGET), str):
            raise InputError(
                f"row {index} has no text {TARGET!r}: give what the model is to write, or Generate(target=...)"
            )
        return self._space + str(row[TARGET])

    def _loss(self, outputs: Batch, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logits, targets = self.read(outputs), batch[TARGETS]
        total = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED)
        return total, (targets != IGNORED).sum()

    def own_json(self) -> dict[str, Any]:
        """The target's text."""
        return {"target": None if self.target is None else self.target.text}

    def __repr__(self) -> str:
        return f"Generate({self.template!r})"
