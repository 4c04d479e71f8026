"""Generate: the model writes what stands at the mask of a template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch.nn.functional import cross_entropy

from bmgraph.errors import InputError
from bmgraph.prompting.generation_verbalizer import TargetText
from bmgraph.prompting.prompts import DECODER_IDS, IDS, padded, text_batch
from bmgraph.prompting.rows import Row, fields_of, some_rows
from bmgraph.prompting.task import Batch, Task, TaskLoss, TaskOptions
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
        **options: Unpack[TaskOptions],
    ) -> None:
        super().__init__(template, model, **options)
        if self.model == "encoder":
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
        read = DECODER_IDS if self.model == "encoder-decoder" else IDS
        return TaskLoss(self._loss, {TARGETS: self.names.get(read, read) or ""})

    def prompts(self, rows: Sequence[Row], longest: int | None = None) -> list[list[int]]:
        """The ids of rows that `engine.generate` continues, or that an encoder reads."""
        return [list(prompt.ids) for prompt in self.prompts_of(rows, longest)]

    def expected(self, rows: Sequence[Row]) -> list[str]:
        """The texts that the model is to write for rows; raises InputError for a row without one."""
        return [self._target(row, index).strip() for index, row in enumerate(some_rows(rows))]

    def batch(self, rows: Sequence[Row], longest: int | None = None) -> Batch:
        """The inputs of rows with a target: ids and attention mask i64[B, S], for an encoder-decoder the decoder's ids i64[B, T],
        and targets i64[B, S] or i64[B, T], which the loss reads. Rows without a target give the inputs of their prompts.

        Raises InputError where some rows have a target, and as `prompts` does.
        """
        given, end = some_rows(rows), self.vocabulary.special_id("eos")
        assert end is not None
        if self.target is None and not any(TARGET in fields_of(row) for row in given):
            return self.named(self.maker.batch(self.prompts_of(given, longest), self.padding, self.segments))
        targets = [[*self.vocabulary.ids(self._target(row, index)), end] for index, row in enumerate(given)]
        made = self._written_apart if self.model == "encoder-decoder" else self._continued
        batch, wanted = made(given, targets, longest)
        return {**self.named(batch), TARGETS: wanted}

    def _written_apart(
        self, rows: Sequence[Row], targets: Sequence[Sequence[int]], longest: int | None
    ) -> tuple[Batch, torch.Tensor]:
        """Inputs and targets of an encoder-decoder, whose decoder is given each target but its last id."""
        start = self.maker.start
        assert start is not None
        batch = text_batch(self.prompts(rows, longest), self.vocabulary, self.padding, self.segments)
        batch[DECODER_IDS], _ = padded([[start, *ids[:-1]] for ids in targets], self.vocabulary, "right")
        return batch, padded(targets, self.vocabulary, "right", IGNORED)[0]

    def _continued(
        self, rows: Sequence[Row], targets: Sequence[Sequence[int]], longest: int | None
    ) -> tuple[Batch, torch.Tensor]:
        """Inputs and targets of a decoder: each prompt with its target behind it, for which the prompt leaves room."""
        limit = self.maker.limit(longest)
        texts, wanted = [], []
        for index, (row, ids) in enumerate(zip(rows, targets)):
            prompt = self.maker.prompt(row, index, None if limit is None else limit - len(ids)).ids
            texts.append([*prompt, *ids])
            wanted.append([*[IGNORED] * (len(prompt) - 1), *ids, IGNORED])
        batch = text_batch(texts, self.vocabulary, self.padding, self.segments)
        return batch, padded(wanted, self.vocabulary, self.padding, IGNORED)[0]

    def _target(self, row: Row, index: int) -> str:
        if self.target is not None:
            return self._space + self.target.of(row, index)
        target = fields_of(row).get(TARGET)
        if not isinstance(target, str):
            raise InputError(
                f"row {index} has no text {TARGET!r}: give what the model is to write, or Generate(target=...)"
            )
        return self._space + target

    def _loss(self, outputs: Batch, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logits, targets = self.read(outputs), batch[TARGETS]
        total = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED)
        return total, (targets != IGNORED).sum()

    def own_json(self) -> dict[str, Any]:
        """The target's text."""
        return {"target": None if self.target is None else self.target.text}

    def __repr__(self) -> str:
        return f"Generate({self.template!r})"
