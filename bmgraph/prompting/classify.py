"""Classify: rows to classes, by what the model says at the masks of a template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self, Unpack

import torch
from torch.nn.functional import cross_entropy

from bmgraph.errors import InputError
from bmgraph.prompting.class_counts import ClassCounts
from bmgraph.prompting.class_scores import CLASSES, HIDDEN, ClassScores
from bmgraph.prompting.prototypical_verbalizer import PrototypicalVerbalizer
from bmgraph.prompting.ptr_verbalizer import PTRVerbalizer
from bmgraph.prompting.rows import LABEL, Row, fields_of, some_rows
from bmgraph.prompting.soft_verbalizer import SoftVerbalizer
from bmgraph.prompting.task import Batch, Task, TaskLoss, TaskOptions
from bmgraph.prompting.template import Template
from bmgraph.prompting.verbalizer import Verbalizer

POSITIONS = "mask_positions"
"""What only the loss reads beside `LABEL`, the class of each row i64[B]: the positions of its masks i64[B, M]."""

CLASS_OUTPUT = "class_scores"
"""The output that the pass `ClassRows` adds."""

VERBALIZERS: Mapping[str, type[ClassScores]] = {
    kind.kind: kind for kind in (Verbalizer, PTRVerbalizer, PrototypicalVerbalizer, SoftVerbalizer)
}


class Classify(Task):
    """Classification by a template and a verbalizer.

    `batch` makes the inputs of rows, `loss` is what a trainer minimises; an engine compiled with `resources={"task": task}`
    classifies texts, and saves the task with itself.

    model: "encoder" (fills masks), "decoder" (continues) or "encoder-decoder"; by default an encoder where the tokenizer has a
    mask. max_length: tokens of a prompt at most, by default what the tokenizer knows of. truncate: where longer texts are cut,
    "tail", "head", "balanced" or "never", which is an error then. padding: the side, by default the tokenizer's. start: the id
    that the decoder of an encoder-decoder starts with. segments: make token types too. names: names of the model's inputs where
    they are others, as in `{"input_ids": "ids"}`, or None for one that it does not take. output: the output with the logits, or,
    for prototypes, with the hidden states.

    Raises InputError for options that are not valid, and for a template whose masks do not fit the verbalizer or the model.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> ids = {"[UNK]": 0, "[MASK]": 1, "fine": 2, "was": 3, "good": 4, "bad": 5}
        >>> words = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> template = Template('{"placeholder": "text_a"} was {"mask"}', words, {"mask": "[MASK]", "unk": "[UNK]"})
        >>> task = Classify(template, Verbalizer({"yes": "good", "no": "bad"}, template.vocabulary))
        >>> task.batch([{"text_a": "fine", "label": "yes"}])
        {'input_ids': tensor([[2, 3, 1]]), 'attention_mask': tensor([[1, 1, 1]]), 'label': tensor([0]), 'mask_positions': tensor([[2]])}
    """

    kind: ClassVar[str] = "classify"

    def __init__(
        self,
        template: Template,
        verbalizer: ClassScores,
        *,
        model: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> None:
        super().__init__(template, model, **options)
        if not isinstance(verbalizer, ClassScores):
            raise InputError(
                f"the verbalizer is a {type(verbalizer).__name__}: give a Verbalizer, a PTRVerbalizer, a PrototypicalVerbalizer or a SoftVerbalizer"
            )
        if verbalizer.masks != template.masks:
            raise InputError(
                f"the template has {template.masks} masks, and the verbalizer words for {verbalizer.masks}: give as many of both"
            )
        if verbalizer.reads == HIDDEN and self.output is None:
            raise InputError(
                "prototypes are of hidden states: name the output that has them, as in output='last_hidden_state'"
            )
        if verbalizer.reads == CLASSES and self.output is None:
            self.output = CLASS_OUTPUT
        self.verbalizer = verbalizer

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes in order."""
        return self.verbalizer.classes

    @property
    def loss(self) -> TaskLoss:
        """The cross-entropy of the classes' scores, summed over rows, and the number of rows."""
        return TaskLoss(self._loss, {LABEL: "", POSITIONS: ""})

    @cached_property
    def measure(self) -> ClassCounts:
        """Accuracy and F1 (macro and micro), for `trainer.evaluate(measure=)` and `trainer.fit(measure=, best="accuracy")`."""
        return ClassCounts(
            lambda outputs, batch: self.scores(outputs, batch[POSITIONS]), self.verbalizer.classes
        )

    def batch(self, rows: Sequence[Row], longest: int | None = None) -> Batch:
        """The inputs of rows: ids and attention mask i64[B, S], and what `Classify` says beside these. Rows with a `label`, by name
        or number, also give label i64[B] and mask_positions i64[B, M], which the loss reads.

        Raises InputError for rows some of which have a label, and as `prompt` does.
        """
        return self.batch_and_positions(rows, longest)[0]

    def batch_and_positions(
        self, rows: Sequence[Row], longest: int | None = None
    ) -> tuple[Batch, torch.Tensor]:
        """What `batch` and `positions` give, from one tokenization."""
        prompts = self.prompts_of(rows, longest)
        batch = self.named(self.maker.batch(prompts, self.padding, self.segments))
        positions = self.maker.positions(prompts, self.padding)
        labels = [fields[LABEL] for fields in map(fields_of, some_rows(rows)) if LABEL in fields]
        if labels and len(labels) < len(rows):
            raise InputError(f"{len(labels)} of {len(rows)} rows have a label: give it for all, or for none")
        if labels:
            numbers = [self.verbalizer.class_index(label, index) for index, label in enumerate(labels)]
            batch[LABEL] = torch.tensor(numbers)
            batch[POSITIONS] = positions
        return batch, positions

    def positions(self, rows: Sequence[Row], longest: int | None = None) -> torch.Tensor:
        """The positions i64[B, M] whose outputs say what stands at the masks, in `batch` of the same rows."""
        return self.maker.positions(self.prompts_of(rows, longest), self.padding)

    def scores(self, outputs: Mapping[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
        """The outputs of a model and the positions i64[B, M] of masks -> scores of classes f[B, C]."""
        return self.verbalizer.scores(at(self.read(outputs), positions))

    def with_verbalizer(self, verbalizer: ClassScores) -> Self:
        """The task with another verbalizer, such as a calibrated one."""
        return type(self)(self.template, verbalizer, model=self.model, **self.options)

    def with_template(self, template: Template | str) -> Self:
        """The task with another template, of its own tokenizer where a text is given."""
        made = Template(template, self.vocabulary) if isinstance(template, str) else template
        return type(self)(made, self.verbalizer, model=self.model, **self.options)

    def own_json(self) -> dict[str, Any]:
        """The verbalizer as plain values."""
        return {"verbalizer": self.verbalizer.as_json()}

    def _loss(self, outputs: Batch, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        values, labels = at(self.read(outputs), batch[POSITIONS]), batch[LABEL]
        total = cross_entropy(self.verbalizer.trained_scores(values), labels, reduction="sum")
        return total, torch.ones_like(labels).sum()

    def __repr__(self) -> str:
        return f"Classify({self.template!r}, {self.verbalizer!r})"


def at(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """values f[B, S, V], positions i64[B, M] -> f[B, M, V]."""
    return values.gather(1, positions[:, :, None].expand(-1, -1, values.shape[-1]))
