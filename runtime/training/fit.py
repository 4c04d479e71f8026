"""The training loop: steps over a loader, with progress, metrics, validation, checkpoints, resumption and interruption."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bmgraph.errors import InputError
from bmgraph.ir.input_kind import InputKind
from bmgraph.runtime.training.agreement import agree
from bmgraph.runtime.training.best_step import LOSS, Best, BestStep
from bmgraph.runtime.training.data_position import Batch, DataPosition
from bmgraph.runtime.training.evaluation import Evaluation
from bmgraph.runtime.training.generators import kept_generators
from bmgraph.runtime.training.interrupt import Interrupts, stop_now
from bmgraph.runtime.training.kept_checkpoints import (
    check_continues,
    checkpoint_path,
    keep_last,
    resume_newest,
)
from bmgraph.runtime.training.metrics import (
    Clock,
    Metrics,
    Record,
    peak_memory,
    tensorboard_is_installed,
)
from bmgraph.runtime.training.progress_line import ProgressLine
from bmgraph.runtime.training.run_measure import RunMeasure
from bmgraph.training.row_measure import RowMeasure
from bmgraph.training.step_program import WHOLE
from bmgraph.utils.did_you_mean import did_you_mean

if TYPE_CHECKING:
    from bmgraph.runtime.training.trainer import StepResult, Trainer

AUTO = "auto"
NEEDED = {
    "save_every": "save", "keep": "save", "eval_every": "eval", "best": "eval", "patience": "eval", "measure": "eval",
}  # fmt: skip
"""Option -> the one that it needs."""


@dataclass(frozen=True)
class FitOptions:
    """The options of `Trainer.fit`; raises InputError for one that is not valid."""

    steps: int
    eval_every: int | None = None
    save: Path | None = None
    save_every: int | None = None
    resume: str | Path | None = None
    keep: int | None = None
    metrics: Path | None = None
    tensorboard: Path | None = None
    log_every: int = 10
    inspect: tuple[str, ...] = ()
    save_wait: bool = True
    best: str | None = None
    patience: int | None = None
    eval: Iterable[Batch] | None = field(default=None, repr=False)
    measure: RowMeasure | RunMeasure | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every", "save_every", "keep", "patience"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name}={value!r}: give a whole number of 1 or more")
        if type(self.save_wait) is not bool:
            raise InputError(f"save_wait={self.save_wait!r}: give True or False")
        for name, needed in NEEDED.items():
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise InputError(f"{name}={getattr(self, name)} needs {needed}=")
        known = (LOSS, *(() if self.measure is None else self.measure.names))
        if self.best is not None and self.best not in known:
            raise InputError(
                f"best={self.best!r}: evaluations have no such figure{did_you_mean(self.best, known)} ({', '.join(known)})"
            )
        if type(self.log_every) is not int or self.log_every < 0:
            raise InputError(f"log_every={self.log_every!r}: give a number of steps, or 0 for no lines")
        if self.resume == AUTO and self.save is None:
            raise InputError('resume="auto" needs save=, the folder whose newest checkpoint it goes on from')


@dataclass(frozen=True)
class Fitted:
    """What a call of `fit` did: the last step's `loss` (None if it made no step), and the last `evaluation`.

    `notes` is what was told; `path` the last checkpoint that was written or resumed from. `best`: the best step, with
    `best=` or `patience=`.
    """

    steps: int
    loss: float | None
    evaluation: Evaluation | None
    path: Path | None
    notes: tuple[str, ...]
    best: Best | None = None


def fit(trainer: Trainer, loader: Iterable[Batch], options: FitOptions) -> Fitted:
    """Run the loop; see `Trainer.fit`."""
    agree(trainer, repr(options))
    loop = _Loop(trainer, loader, options)
    loop.resume()
    with ExitStack() as stack:
        stopped = loop.run(stack)
    if stopped is not None:
        stop_now(stopped)
    return Fitted(trainer.steps, loop.loss, loop.evaluation, loop.path, tuple(loop.notes), loop.best())


class _Loop:
    """The state of one call of `fit`."""

    def __init__(self, trainer: Trainer, loader: Iterable[Batch], options: FitOptions) -> None:
        self.trainer, self.options = trainer, options
        self.loss: float | None = None
        self.evaluation: Evaluation | None = None
        self.path: Path | None = None
        self.notes: list[str] = []
        self._first = trainer.state.ranks.rank == 0
        self._line: ProgressLine | None = None
        self._saved_step = -1
        self._ids = [spec.name for spec in trainer.state.outline.inputs if spec.kind is InputKind.IDS]
        self._data = self._position(loader)
        self._best = self._best_step()

    def _position(self, loader: Iterable[Batch]) -> DataPosition:
        """The position in the loader: that of the last `fit` with the same loader, which goes on, else a new one."""
        sections = self.trainer.sections
        for section in sections:
            if isinstance(section, DataPosition):
                if section.loader is loader:
                    return section
                sections.remove(section)
                break
        position = DataPosition(loader, self.trainer.state.ranks, self.trainer.batch)
        sections.append(position)
        return position

    def _best_step(self) -> BestStep | None:
        """What compares evaluations: that of the last `fit` by the same figure, which goes on, else a new one."""
        options, sections = self.options, self.trainer.sections
        wanted = options.best or LOSS if (options.best or options.patience) else None
        for section in sections:
            if isinstance(section, BestStep):
                if section.figure == wanted:
                    return section
                sections.remove(section)
                break
        if wanted is None:
            return None
        found = BestStep(wanted)
        sections.append(found)
        return found

    def best(self) -> Best | None:
        """The best step so far, None if there is none."""
        best, folder = self._best, self.options.save
        if best is None or not best.step:
            return None
        path = None if folder is None else checkpoint_path(folder, best.step)
        return Best(best.step, best.figure, best.value, path)

    def resume(self) -> None:
        """Load the checkpoint that the options name."""
        trainer, resume, folder = self.trainer, self.options.resume, self.options.save
        before = len(trainer.report.notes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is said below
            if resume == AUTO:
                assert folder is not None
                self.path = resume_newest(trainer, folder, self.tell)
            elif resume is not None:
                self.path = Path(resume)
                trainer.load(self.path)
        if resume is None and folder is not None:
            check_continues(trainer, folder)
        if self.path is not None:
            self._saved_step = trainer.steps if self.path.parent == folder else -1
            told = [note for note in trainer.report.notes[before:] if note not in self.notes]
            self.notes += told
            self._say(f"resumed from {self.path}, after step {trainer.steps}")
            for note in told:
                self._say(note)

    def run(self, stack: ExitStack) -> int | None:
        """Make the steps; returns the signal that interrupted them, if any."""
        trainer, options = self.trainer, self.options
        interrupts = stack.enter_context(Interrupts())
        begin, steps = trainer.steps, options.steps
        self._line = stack.enter_context(ProgressLine(begin, steps, options.log_every, self._first))
        metrics = self._metrics()
        stack.callback(metrics.close)
        if options.inspect:
            trainer.inspect(*options.inspect)  # from here on their gradient norms are taken
        clock, stopped = Clock(), None
        while trainer.steps < steps and not self._has_waited():
            stopped = self._stopped(interrupts)
            batch = self._next_batch() if stopped is None else None
            if batch is None:
                break
            tokens = self._tokens(batch)
            result = trainer.step(batch)
            self.loss = result.loss
            if result.skipped:
                self._say(f"step {result.step} was skipped: {result.skipped}")
            record = self._record(result, tokens, clock.read())
            last = trainer.steps == steps
            if self._is_due(options.eval_every, last) and options.eval is not None:
                record["eval"] = self._evaluate(options.eval)
                self._save_best()
                clock.read()
            if options.inspect and self._is_due(options.log_every or None, last):
                record["tensors"] = trainer.inspect(*options.inspect).as_json()
            if self._first:
                metrics.write(record)
            self._line.step(record)
            if options.save is not None and self._is_due(options.save_every, last):
                self._save(options.save, wait=options.save_wait or last)
                clock.read()
        if options.save is not None and trainer.steps > begin:
            self._save(options.save, wait=True)
        if stopped is not None:
            where = f", saved to {self.path}" if options.save is not None else ""
            self._say(f"interrupted after step {trainer.steps}{where}")
        return stopped

    def _save_best(self) -> None:
        """Save the step if its evaluation is the best so far."""
        assert self.evaluation is not None
        if self._best is None or not self._best.see(self.trainer.steps, self.evaluation):
            return
        if self.options.save is not None:
            self._save(self.options.save, wait=True)  # the one before is deleted only then

    def _has_waited(self) -> bool:
        """Whether too many evaluations were no better, which is told."""
        best = self.best()
        if self._best is None or not self._best.stops(self.options.patience):
            return False
        told = (
            "none was finite"
            if best is None
            else f"the best {best.figure} is {best.value:.4f}, of step {best.step}"
        )
        self.tell(
            f"stopped after step {self.trainer.steps} of {self.options.steps}: {self._best.waited} evaluations were no better ({told})"
        )
        return True

    def tell(self, text: str) -> None:
        """Tell the user something that stays in the report."""
        self.notes.append(text)
        self.trainer.report.notes.append(text)
        self._say(text)

    def _say(self, text: str) -> None:
        line = self._line or ProgressLine(0, 0, 0, self._first)
        line.say(text)

    def _is_due(self, every: int | None, last: bool) -> bool:
        return last or (every is not None and self.trainer.steps % every == 0)

    def _metrics(self) -> Metrics:
        options, step = self.options, self.trainer.steps
        path, board = options.metrics, options.tensorboard
        if options.save is not None:
            path = path or options.save / "metrics.jsonl"
            if board is None and tensorboard_is_installed():
                board = options.save / "tensorboard"
        with self.trainer.state.ranks.fail_together():
            return (
                Metrics(path, board, step, self.tell) if self._first else Metrics(None, None, step, self.tell)
            )

    def _stopped(self, interrupts: Interrupts) -> int | None:
        """The signal that any rank was sent, the same on all ranks."""
        state, asked = self.trainer.state, interrupts.asked or 0
        if state.ranks.size > 1:
            asked = int(state.ranks.gather(torch.tensor([asked], device=state.device)).max())
        return asked or None

    def _next_batch(self) -> Batch | None:
        """The next batch, of the next epoch where this one has ended on any rank; None at the end of a loader that can be read
        only once. Collective."""
        state, data = self.trainer.state, self._data
        while True:
            with state.ranks.fail_together():
                batch = data.take()
            ended = torch.tensor([int(batch is None)], device=state.device)
            flags = state.ranks.gather(ended).tolist() if state.ranks.size > 1 else [int(batch is None)]
            if not any(flags):
                return batch
            if not all(flags):
                self.tell(
                    f"the data of rank {flags.index(1)} ended before that of others in epoch {data.epoch}, which ends on all "
                    "ranks: batches that others had left are not trained on"
                )
            with state.ranks.fail_together():
                if data.once:
                    data.check_not_empty()
                    self.tell(
                        f"the data ended after {self.trainer.steps} of {self.options.steps} steps: it can be read only once; "
                        "give a loader that can be read again for more epochs"
                    )
                    return None
                data.next_epoch()

    def _tokens(self, batch: Mapping[str, object]) -> int:
        """The number of ids in what this rank was given."""
        given = (batch.get(name) for name in self._ids)
        return sum(value.numel() for value in given if isinstance(value, torch.Tensor))

    def _record(self, result: StepResult, tokens: int, seconds: float) -> Record:
        """The figures of a step, without those that are not known."""
        state = self.trainer.state
        if self.trainer.batch != WHOLE and state.ranks.size > 1:
            tokens = int(state.ranks.sum(torch.tensor(tokens, device=state.device)))
        record: dict[str, Any] = {**asdict(result), "epoch": self._data.epoch, "seconds": seconds}
        if tokens:
            record["tokens_per_second"] = tokens / seconds
        record["items_per_second"] = result.count / seconds
        record["memory"] = peak_memory(state.device)
        return {name: value for name, value in record.items() if value not in (None, "")}

    def _evaluate(self, loader: Iterable[Batch]) -> Record:
        measure = self.options.measure
        with kept_generators():
            if isinstance(measure, RunMeasure):
                found = self.trainer.evaluate(loader)
                found = replace(found, measures=measure.of(self.trainer))
            else:
                found = self.trainer.evaluate(loader, measure)
        self.evaluation = found
        perplexity = "" if found.perplexity is None else f", perplexity {found.perplexity:.2f}"
        told = "".join(f", {name} {value:.4f}" for name, value in found.measures.items())
        self._say(f"step {self.trainer.steps}: validation loss {found.loss:.4f}{perplexity}{told}")
        return {name: value for name, value in asdict(found).items() if value not in (None, {})}

    def _save(self, folder: Path, wait: bool) -> None:
        """Write a checkpoint of this step, unless there is one, and delete those that are too old.

        One that is still being written has no name yet: it is neither counted nor deleted, and the older ones stay until it
        has one.
        """
        trainer, keep = self.trainer, self.options.keep
        if trainer.steps != self._saved_step:
            self.path = checkpoint_path(folder, trainer.steps)
            trainer.save(self.path, wait)
            self._saved_step = trainer.steps
        if wait and not self.options.save_wait:
            trainer.wait()  # and hear whether the one before failed
        if keep is not None:
            with trainer.state.ranks.on_rank0() as first:
                if first:
                    keep_last(folder, keep, None if self._best is None else self._best.step)
