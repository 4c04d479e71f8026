"""run_task: a task on a model, from zero-shot to full tuning, with the best checkpoint kept, and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from bmgraph.prompting.measures import Measures
from bmgraph.prompting.rows import Row, some_rows, without_label
from bmgraph.runtime.engine_base import ROWS
from bmgraph.runtime.training.best_step import Best
from bmgraph.runtime.training.fit import Fitted
from bmgraph.runtime.training.trainer import Trainer

if TYPE_CHECKING:
    from bmgraph.runtime.torch.engine import TorchEngine

EXAMPLE = 4
"""Rows of the example that a model is captured with."""


@dataclass(frozen=True)
class TaskRun:
    """What `run_task` did: the `engine` with the task, and the measures of its classes on the rows of `valid` and `test`.

    Beside these, where it trained: the `trainer` at its best step, what `fit` returned, and the `best` step.
    """

    engine: TorchEngine
    valid: Measures | None
    test: Measures | None
    trainer: Trainer | None = None
    fitted: Fitted | None = None

    @property
    def best(self) -> Best | None:
        """The step by which the best evaluation was made, None if there was none."""
        return None if self.fitted is None else self.fitted.best


def run_task(
    model: nn.Module | Program,
    task: Classify,
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
    best: str = "accuracy",
    patience: int | None = None,
    calibrate: Sequence[Row] = (),
    save: str | Path | None = None,
    seed: int = 0,
    verify: Verify = "numeric",
) -> TaskRun:
    """Classify rows by a task: as the model is (zero-shot), or trained on rows with labels, all of them or a few of each class.

    Without `train` the model is measured after `passes`. With it what the passes leave to train (a delta, or all weights) is
    trained for `steps` by `backend`, `Torch(optimizer=...)`, whose loss becomes the task's, on batches of `batch_size` rows that are
    shuffled by `seed`. few_shot: draws the rows to train on, and, where `valid` is empty, those to validate on, out of `train`. Every
    `eval_every` steps (by default an epoch) the rows of `valid` are evaluated; the trainer ends at the step whose `best`
    figure ("accuracy", "macro_f1", "micro_f1" or "loss") was best, and stops early by `patience`; see `trainer.fit`, as for
    `save`, from which an interrupted run goes on. calibrate: rows without content, see `engine.calibrate`; done at the end.

    Raises InputError for options that do not fit together, and what `compile`, `fit` and `classify` raise.

    Example:
        >>> import bmgraph as bg
        >>> def zero_shot(model, task, rows):
        ...     return bg.run_task(model, task, test=rows, calibrate=["", "N/A"]).test.accuracy
    """
    if not isinstance(task, Classify):
        raise InputError(f"the task is a {type(task).__name__}: give a Classify; others train by trainer.fit")
    if few_shot is not None and train:
        train, drawn = few_shot.sample(train)
        valid = valid or drawn
    rows = some_rows([*(train or test), *valid])
    example = None if isinstance(model, Program) else _example(task, rows, bool(train))
    if not train:
        _check_untrained(backend, steps, few_shot)
        engine = compile_model(
            model, passes, example=example, backend=Torch(), resources={"task": task}, verify=verify
        )
        return _measured(engine, calibrate, valid, test)
    if backend is None or steps is None:
        raise InputError("rows to train on need backend=Torch(optimizer=...) and steps=")
    trainer: Trainer = compile_model(
        model, passes, example=example, backend=replace(backend, loss=task.loss), verify=verify
    )
    loader = task.batches(train, batch_size, seed)
    choice: dict[str, Any] = {}
    if valid:
        choice = {
            "eval": task.batches(valid, ROWS), "eval_every": eval_every or len(loader), "measure": task.measure,
            "best": best, "patience": patience, "keep": 1,
        }  # fmt: skip
    fitted = _fitted(trainer, loader, steps, None if save is None else Path(save), choice)
    engine = compile_model(trainer.program(), backend=Torch(), resources={"task": task}, verify=verify)
    return replace(_measured(engine, calibrate, valid, test), trainer=trainer, fitted=fitted)


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


def _example(task: Classify, rows: Sequence[Row], labels: bool) -> dict[str, torch.Tensor]:
    """A batch to capture a model with."""
    some = rows[:EXAMPLE]
    return task.example(some if labels else [without_label(row) for row in some])


def _check_untrained(backend: object, steps: object, few_shot: object) -> None:
    """Raise InputError for options of training where there are no rows to train on."""
    for name, value in (("backend", backend), ("steps", steps), ("few_shot", few_shot)):
        if value is not None:
            raise InputError(f"{name}= is for training: give train=, rows with labels")


def _measured(
    engine: TorchEngine, calibrate: Sequence[Row], valid: Sequence[Row], test: Sequence[Row]
) -> TaskRun:
    if calibrate:
        engine.calibrate(calibrate)
    of_valid, of_test = (engine.measure(rows) if rows else None for rows in (valid, test))
    return TaskRun(engine, of_valid, of_test)
