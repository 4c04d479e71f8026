"""Task: what classification and generation have in common; it is plain data, which is saved with an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypedDict

import torch

from bmgraph.errors import InputError
from bmgraph.prompting.batches import TaskBatches
from bmgraph.prompting.prompts import ATTENTION, DECODER_IDS, IDS, MODELS, SEGMENTS, Prompt, PromptMaker
from bmgraph.prompting.rows import Row, some_rows
from bmgraph.prompting.template import MASK, Template
from bmgraph.prompting.truncation import check_method
from bmgraph.prompting.vocabulary import SIDES
from bmgraph.utils.did_you_mean import did_you_mean

Batch = dict[str, torch.Tensor]
NAMES = (IDS, ATTENTION, SEGMENTS, DECODER_IDS)
LOGITS = "logits"


class TaskLoss:
    """A loss of (outputs, inputs) that returns a sum over items and their number, as `Torch(loss=...)` takes it.

    `inputs` names the inputs that only it reads, each with one of the model's whose sizes it has, or "": the model does not get them.
    """

    def __init__(
        self, call: Callable[[Batch, Batch], tuple[torch.Tensor, torch.Tensor]], inputs: Mapping[str, str]
    ) -> None:
        self._call, self.inputs = call, inputs

    def __call__(self, outputs: Batch, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(summed loss, number of items), two scalars."""
        for name in self.inputs:
            if name not in batch:
                raise InputError(
                    f"the loss of a task needs the input {name!r}: give an example of rows that have labels or targets"
                )
        return self._call(outputs, batch)


class TaskOptions(TypedDict, total=False):
    """The options of every task beside the kind of model, by name; see `Classify`."""

    max_length: int | None
    truncate: str
    padding: str | None
    start: int | None
    segments: bool
    names: Mapping[str, str | None] | None
    output: str | None


class Task(ABC):
    """Prompts of a template for a kind of model, as batches and as a loss."""

    kind: ClassVar[str]

    def __init__(
        self,
        template: Template,
        model: str | None,
        *,
        max_length: int | None = None,
        truncate: str = "tail",
        padding: str | None = None,
        start: int | None = None,
        segments: bool = False,
        names: Mapping[str, str | None] | None = None,
        output: str | None = None,
    ) -> None:
        vocabulary = template.vocabulary
        if model is None:
            model = "encoder" if vocabulary.special_id(MASK) is not None else "decoder"
        if model not in MODELS:
            raise InputError(f"model={model!r}: choose one of {', '.join(MODELS)}")
        if padding is not None and padding not in SIDES:
            raise InputError(f"padding={padding!r}: choose one of {', '.join(SIDES)}")
        if max_length is not None and (type(max_length) is not int or max_length < 1):
            raise InputError(f"max_length={max_length!r}: give a number of tokens")
        check_method(truncate)
        for name in names or {}:
            if name not in NAMES:
                raise InputError(
                    f"names={{{name!r}: ...}}: a task makes no such input{did_you_mean(name, NAMES)} ({', '.join(NAMES)})"
                )
        if not all(name is None or isinstance(name, str) for name in (*(names or {}).values(), output)):
            raise InputError(f"names={names!r}, output={output!r}: give texts, or None")
        if start is not None and (type(start) is not int or start < 0):
            raise InputError(f"start={start!r}: give an id, a whole number from 0 on")
        self.template, self.vocabulary, self.segments = template, vocabulary, segments
        self.padding = padding or vocabulary.side
        self.names, self.output, self.max_length = dict(names or {}), output, max_length
        longest = max_length if max_length is not None else vocabulary.longest
        self.maker = PromptMaker(template, model, truncate, longest, start)

    @property
    def model(self) -> str:
        """The kind of model: "encoder", "decoder" or "encoder-decoder"."""
        return self.maker.model

    @property
    def options(self) -> TaskOptions:
        """The options that make the task again, for the same kind of model."""
        return {
            "max_length": self.max_length, "truncate": self.maker.truncate, "padding": self.padding, "start": self.maker.start,
            "segments": self.segments, "names": self.names, "output": self.output,
        }  # fmt: skip

    @property
    @abstractmethod
    def loss(self) -> TaskLoss:
        """What `Torch(optimizer, loss=task.loss)` minimises."""

    @abstractmethod
    def batch(self, rows: Sequence[Row], longest: int | None = None) -> Batch:
        """The model's inputs for rows, an example for `compile` and for steps of training."""

    def batches(self, rows: Sequence[Row], size: int = 16, seed: int | None = None) -> TaskBatches:
        """Rows as a loader of `batch`es of `size` rows, for `trainer.fit` and `evaluate`; with a `seed` shuffled in each epoch."""
        return TaskBatches(self, rows, size, seed)

    def example(self, rows: Sequence[Row], longest: int | None = None) -> Batch:
        """As `batch`, with the id 0 for soft tokens: an example for a model that gets them only by the pass `SoftTokens`."""
        batch = self.batch(rows, longest)
        ids = self.names.get(IDS, IDS)
        return {name: value.clamp(min=0) if name == ids else value for name, value in batch.items()}

    @abstractmethod
    def own_json(self) -> dict[str, Any]:
        """What only this kind of task has, as plain values."""

    def as_json(self) -> dict[str, Any]:
        """The task as plain values, without the tokenizer's JSON (`vocabulary.text`)."""
        vocabulary = self.vocabulary
        return {
            "kind": self.kind, "template": self.template.text, "special": dict(vocabulary.special), "side": vocabulary.side,
            "longest": vocabulary.longest, "model": self.model, **self.options, **self.own_json(),
        }  # fmt: skip

    def prompts_of(self, rows: Sequence[Row], longest: int | None = None) -> list[Prompt]:
        """The prompts of rows; raises InputError if there is none."""
        return [self.maker.prompt(row, index, longest) for index, row in enumerate(some_rows(rows))]

    def named(self, batch: Batch) -> Batch:
        """A batch by the model's own names of inputs, without those that it does not take."""
        names = {name: self.names.get(name, name) for name in batch}
        return {new: batch[name] for name, new in names.items() if new is not None}

    def read(self, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The output f[B, S, V] that is read: `output`, else "logits", else the only one of that form. Raises InputError."""
        if self.output is not None and self.output in outputs:
            return outputs[self.output]
        if self.output is not None:
            raise InputError(
                f"the model has no output {self.output!r}{did_you_mean(self.output, outputs)} (it has {', '.join(outputs)})"
            )
        if LOGITS in outputs:
            return outputs[LOGITS]
        found = [name for name, value in outputs.items() if value.dim() == 3 and value.is_floating_point()]
        if len(found) != 1:
            raise InputError(
                f"which of the outputs {', '.join(outputs)} has the logits is not known: give output="
            )
        return outputs[found[0]]
