"""run_task: a task on a model, from zero-shot to full tuning, with the best checkpoint kept, and measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bmgraph.backends.torch.backend import Torch
from bmgraph.compiler import compile as compile_model
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.pass_manager.run_settings import Verify
from bmgraph.prompting.batches import TaskBatches
from bmgraph.prompting.classify import Classify
from bmgraph.prompting.few_shot import FewShot
from bmgraph.prompting.generate import Generate
from bmgraph.prompting.measures import Measures
from bmgraph.prompting.rows import Row, some_rows, without_label
from bmgraph.prompting.text_measures import TextMeasures
from bmgraph.runners.written_texts import EXACT, WrittenTexts, measured_texts
from bmgraph.runtime.engine_base import ROWS
from bmgraph.runtime.training.best_step import Best
from bmgraph.runtime.training.fit import Fitted
from bmgraph.runtime.training.run_measure import RunMeasure
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.training.row_measure import RowMeasure

if TYPE_CHECKING:
    from bmgraph.runtime.torch.engine import TorchEngine

EXAMPLE = 4
"""Rows of the example that a model is captured with."""


@dataclass(frozen=True)
class TaskRun:
    """What `run_task` did: the `engine` with the task, and the measures of its classes (or, of a Generate, of its texts) on the rows of
    `valid` and `test`.

    Beside these, where it trained: the `trainer` at its best step, what `fit` returned, and the `best` step.
    """

    engine: TorchEngine
    valid: Measures | TextMeasures | None
    test: Measures | TextMeasures | None
    trainer: Trainer | None = None
    fitted: Fitted | None = None

    @property
    def best(self) -> Best | None:
        """The step by which the best evaluation was made, None if there was none."""
        return None if self.fitted is None else self.fitted.best


def run_task(
    model: nn.Module | Program,
    task: Classify | Generate,
    *,
    passes: Sequence[Pass] = (),
    backend: Torch[Any] | None = None,
    train: Sequence[Row] = (),
    valid: Sequence[Row] = (),
    test: Sequence[Row] = (),
    few_shot: FewShot | None = None,
    steps: int | None = None,
    batch_size: int = 16,
    eval_every: int | None = None,
    best: str | None = None,
    patience: int | None = None,
    calibrate: Sequence[Row] = (),
    scores: Sequence[str] = (),
    max_new_tokens: int = 32,
    save: str | Path | None = None,
    seed: int = 0,
    verify: Verify = "numeric",
) -> TaskRun:
    """Classify rows by a task, or write texts for them: as the model is (zero-shot), or trained on rows with labels (or targets), all
    of them or a few of each class.

    Without `train` the model is measured after `passes`. With it what the passes leave to train (a delta, or all weights) is
    trained for `steps` by `backend`, `Torch(optimizer=...)`, whose loss becomes the task's, on batches of `batch_size` rows that are
    shuffled by `seed`. few_shot: draws the rows to train on, and, where `valid` is empty, those to validate on, out of `train`. Every
    `eval_every` steps (by default an epoch) the rows of `valid` are evaluated; the trainer ends at the step whose `best`
    figure ("accuracy", by default, "macro_f1", "micro_f1" or "loss") was best, and stops early by `patience`; see `trainer.fit`, as for
    `save`, from which an interrupted run goes on. calibrate: rows without content, see `engine.calibrate`; done at the end.

    A `Generate` trains by its targets (teacher forcing), and is evaluated by what it then writes, greedily and up to `max_new_tokens`
    tokens, with a KV cache that each evaluation builds anew: `best` is "exact" (by default, the share of texts that are the expected
    ones), a figure of `scores` ("rouge1", "rouge2", "rougeL" of "rouge", "bleu" of "bleu"; see `TextMeasures`) or "loss".

    Raises InputError for options that do not fit together, and what `compile`, `fit` and `classify` raise.

    Example:
        >>> import bmgraph as bg
        >>> def zero_shot(model, task, rows):
        ...     return bg.run_task(model, task, test=rows, calibrate=["", "N/A"]).test.accuracy
    """
    if not isinstance(task, (Classify, Generate)):
        raise InputError(f"the task is a {type(task).__name__}: give a Classify or a Generate")
    judge = _judge(task, scores, max_new_tokens, few_shot, calibrate, verify)
    if few_shot is not None and train:
        train, drawn = few_shot.sample(train)
        valid = valid or drawn
    rows = some_rows([*(train or test), *valid])
    example = None if isinstance(model, Program) else _example(task, rows, bool(train))
    if not train:
        _check_untrained(backend, steps, few_shot)
        engine = compile_model(
            model, passes, example=example, backend=judge.backend, resources={"task": task}, verify=verify
        )
        return judge.measured(engine, valid, test)
    if backend is None or steps is None:
        raise InputError("rows to train on need backend=Torch(optimizer=...) and steps=")
    trainer: Trainer = compile_model(
        model, passes, example=example, backend=replace(backend, loss=task.loss), verify=verify
    )
    loader = task.batches(train, batch_size, seed)
    choice: dict[str, Any] = {}
    if valid:
        choice = {
            "eval": task.batches(valid, ROWS), "eval_every": eval_every or len(loader), "measure": judge.measure(valid),
            "best": best or judge.best, "patience": patience, "keep": 1,
        }  # fmt: skip
    fitted = _fitted(trainer, loader, steps, None if save is None else Path(save), choice)
    engine = compile_model(trainer.program(), backend=judge.backend, resources={"task": task}, verify=verify)
    return replace(judge.measured(engine, valid, test), trainer=trainer, fitted=fitted)


class _Judge(ABC):
    """How a kind of task is measured: by `best` where the caller names no figure, on an engine of `backend`."""

    best: str
    backend: Torch[Any]

    @abstractmethod
    def measure(self, valid: Sequence[Row]) -> RowMeasure | RunMeasure:
        """What `fit` measures."""

    @abstractmethod
    def measured(self, engine: TorchEngine, valid: Sequence[Row], test: Sequence[Row]) -> TaskRun:
        """The measures of an engine, which are of texts or of classes."""


@dataclass(frozen=True)
class _OfClasses(_Judge):
    """By the classes of rows."""

    task: Classify
    calibrate: Sequence[Row]
    best: str = "accuracy"
    backend: Torch[Any] = field(default_factory=Torch)

    def measure(self, valid: Sequence[Row]) -> RowMeasure:
        return self.task.measure

    def measured(self, engine: TorchEngine, valid: Sequence[Row], test: Sequence[Row]) -> TaskRun:
        if self.calibrate:
            engine.calibrate(self.calibrate)
        of_valid, of_test = (engine.measure(rows) if rows else None for rows in (valid, test))
        return TaskRun(engine, of_valid, of_test)


@dataclass(frozen=True)
class _OfTexts(_Judge):
    """By the texts that are written for rows."""

    task: Generate
    scores: tuple[str, ...]
    tokens: int
    verify: Verify
    best: str = EXACT
    backend: Torch[Any] = field(default_factory=lambda: Torch(generate=True))

    def measure(self, valid: Sequence[Row]) -> RunMeasure:
        return WrittenTexts(self.task, valid, self.scores, self.tokens, self.verify)

    def measured(self, engine: TorchEngine, valid: Sequence[Row], test: Sequence[Row]) -> TaskRun:
        of_valid, of_test = (
            measured_texts(engine, self.task, rows, self.scores, self.tokens) if rows else None
            for rows in (valid, test)
        )
        return TaskRun(engine, of_valid, of_test)


def _judge(
    task: Classify | Generate,
    scores: Sequence[str],
    max_new_tokens: int,
    few_shot: FewShot | None,
    calibrate: Sequence[Row],
    verify: Verify,
) -> _Judge:
    """How a task is measured; raises InputError for options of the other kind of task."""
    if isinstance(task, Classify):
        if scores:
            raise InputError(
                f"scores={tuple(scores)}: they measure the texts of a Generate, and the task is a Classify"
            )
        return _OfClasses(task, calibrate)
    for name, value in (("few_shot", few_shot), ("calibrate", calibrate)):
        if value:
            raise InputError(f"{name}= is of classes: give it with a Classify, the task is a Generate")
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens!r}: give a number of tokens, 1 or more")
    return _OfTexts(task, tuple(scores), max_new_tokens, verify)


def _fitted(
    trainer: Trainer, loader: TaskBatches, steps: int, save: Path | None, choice: dict[str, Any]
) -> Fitted:
    """Train, and go back to the best step where there is one; without a folder to `save` to, one that is deleted keeps it."""
    if save is not None:
        fitted = trainer.fit(loader, steps, save=save, resume="auto", **choice)
        _go_back(trainer, fitted.best)
        return fitted
    if not choice:
        return trainer.fit(loader, steps)
    if trainer.state.ranks.size > 1:
        raise InputError("several ranks keep their best checkpoint in one folder: give save=")
    with TemporaryDirectory(prefix="bmgraph-") as folder:
        fitted = trainer.fit(loader, steps, save=folder, **choice)
        _go_back(trainer, fitted.best)
    best = None if fitted.best is None else replace(fitted.best, path=None)
    return replace(fitted, path=None, best=best)


def _go_back(trainer: Trainer, best: Best | None) -> None:
    """Load the checkpoint of the best step, if it is not the last."""
    if best is not None and best.step != trainer.steps:
        assert best.path is not None
        trainer.load(best.path)


def _example(task: Classify | Generate, rows: Sequence[Row], labels: bool) -> dict[str, torch.Tensor]:
    """A batch to capture a model with."""
    some = rows[:EXAMPLE]
    if labels:
        return task.example(some)
    if isinstance(task, Classify):
        return task.example([without_label(row) for row in some])
    read = task.loss.inputs
    return {name: value for name, value in task.example(some).items() if name not in read}


def _check_untrained(backend: object, steps: object, few_shot: object) -> None:
    """Raise InputError for options of training where there are no rows to train on."""
    for name, value in (("backend", backend), ("steps", steps), ("few_shot", few_shot)):
        if value is not None:
            raise InputError(f"{name}= is for training: give train=, rows with labels")
