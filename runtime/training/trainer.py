"""Trainer: runs training steps, and returns the trained program."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from bmgraph.deltas.backbone import backbone_of
from bmgraph.deltas.peft_format import save_adapter
from bmgraph.errors import InputError
from bmgraph.ir.joined_graphs import Part
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import propagate
from bmgraph.ir.split_graphs import split
from bmgraph.pass_manager.report import Report
from bmgraph.runtime.training.agreement import check_saved, check_settings, together
from bmgraph.runtime.training.batch_sharding import check_divisible, check_shareable, rows_of_rank
from bmgraph.runtime.training.checkpoint import load_trainer
from bmgraph.runtime.training.checkpoint_save import save_trainer
from bmgraph.runtime.training.checkpoint_sections import Section
from bmgraph.runtime.training.evaluation import Evaluation, Evaluator
from bmgraph.runtime.training.fit import FitOptions, Fitted, fit
from bmgraph.runtime.training.inspection import Inspection, Inspector
from bmgraph.runtime.training.run_measure import RunMeasure
from bmgraph.runtime.training.saver import Saver
from bmgraph.runtime.training.step_guard import StepGuard
from bmgraph.runtime.training.step_rules import StepRules
from bmgraph.runtime.training.update_in_backward import UpdateInBackward, check_in_backward, counted
from bmgraph.training.compiled_regions import CompiledRegions
from bmgraph.training.gradient_phase import GradientPhase
from bmgraph.training.loss_scale import LossScale
from bmgraph.training.lr_schedules import Constant, Schedule
from bmgraph.training.optimizers import Optimizer
from bmgraph.training.parameter_groups import groups_of
from bmgraph.training.precision import MAX_SKIPS, STOP
from bmgraph.training.row_measure import RowMeasure
from bmgraph.training.step_plan import StepPlan, plan_step
from bmgraph.training.step_program import CONSTANT, WHOLE, StepProgram
from bmgraph.training.update_phase import UpdatePhase
from bmgraph.utils.digest import fingerprint

TIMEOUT = 60.0
"""Seconds that ranks wait for each other in a step."""


@dataclass(frozen=True)
class StepResult:
    """One step: the mean loss over the `count` items of the whole batch, before the update.

    `count` is whole unless the loss counts items by their weights. `rate` is the learning rate, `norm` the L2 norm of all gradients before clipping, None without clipping.
    `skipped` says why no update was made, empty if one was; such a step counts as a step, but neither parameters nor buffers
    change. `scale` is the loss scale of this step, None if it is not in float16.
    """

    step: int
    loss: float
    count: float
    rate: float
    norm: float | None = None
    skipped: str = ""
    scale: float | None = None


class Trainer:
    """Trains a program on this rank, together with all ranks of torch.distributed if it was started.

    Every method is collective, and checks that it is: all ranks call it with the same arguments (with batch="rank", `step` with batches of
    their own). Where a rank has left, was stopped or does not answer within `timeout` seconds, the others raise RankError, which
    says which rank and why.

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.backends import AdamW, Torch
        >>> def squared(outputs, inputs):
        ...     return outputs["output"].square().sum(), torch.ones_like(outputs["output"]).sum()
        >>> model, x = torch.nn.Linear(4, 2), torch.randn(6, 4)
        >>> trainer = bg.compile(model, example=(x,), backend=Torch(optimizer=AdamW(lr=1e-2), loss=squared))
        >>> first = trainer.step({"input": x}).loss
        >>> trainer.step({"input": x}).loss < first
        True
    """

    def __init__(
        self,
        step: StepProgram,
        optimizer: Optimizer,
        *,
        schedule: Schedule | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
        loss_scale: LossScale | None = None,
        on_nan: str = STOP,
        max_skips: int = MAX_SKIPS,
        seed: int = 0,
        batch: str = WHOLE,
        timeout: float = TIMEOUT,
        optimizer_in_backward: bool = False,
        torch_compile: bool = False,
        parts: Sequence[Part] = (),
        report: Report | None = None,
    ) -> None:
        if step.ranks.size > 1 and not step.shared:
            raise InputError(
                f"{step.ranks.size} ranks need a pass that shards the step over them: passes=[..., ZeRO(3)]"
            )
        if batch == WHOLE:
            check_shareable(step)
        if accumulate > 1:
            check_divisible(step, accumulate)
        self.steps = 0
        self.seed = seed
        self.optimizer = optimizer
        self.schedule = schedule or Constant()
        self.clip_norm = clip_norm
        self.accumulate = accumulate
        self.on_nan = on_nan
        self.batch = batch
        self.timeout = timeout
        self.called: set[str] = set()
        """The methods that all ranks have gone through once: what is built on the first call is there."""
        self.parts = tuple(parts)
        self.report = report or Report()
        self.state = step
        self._evaluator: Evaluator | None = None
        self.saver = Saver()
        """Writes checkpoints that nobody waits for."""
        self._inspector = Inspector(step)
        self.sections: list[Section] = []
        """What checkpoints hold beside tensors, steps and settings."""
        for name in step.trained:
            if not step.places[name].packed:  # still shared with the program
                held = step.masters if name in step.masters else step.tensors
                held[name] = held[name].clone()
        self.update = UpdatePhase(step, groups_of(step, optimizer))
        self.update.begin(optimizer)
        self.guard = StepGuard(step, self.update, on_nan, max_skips, loss_scale or LossScale())
        self.in_backward: UpdateInBackward | None = None
        if optimizer_in_backward:
            check_in_backward(self.update, clip_norm, on_nan, self.guard.scale is not None)
            self.in_backward = UpdateInBackward(self.update, self.guard, self._inspector)
        taken = None if self.in_backward is None else self.in_backward.take
        self.regions = CompiledRegions() if torch_compile else None
        self.gradients = GradientPhase(step, accumulate, batch, taken, self.regions)
        self.sections.append(self.guard)
        self.rules = StepRules(step, self.update, optimizer_in_backward)
        if self.rules.gates:
            self.sections.append(self.rules)
        check_settings(self)

    @together
    def step(self, batch: Mapping[str, object]) -> StepResult:
        """One step on a whole batch (inputs by name), of which every rank takes its rows; with batch="rank", on the batches
        of all ranks together.

        Raises InputError if the batch does not fit the program, differs between ranks or cannot be sharded, if no item
        counts for the loss, and, with on_nan="stop", if the loss or a gradient is not finite. What fails on one rank fails
        on all, and then neither parameters nor buffers change; but with optimizer_in_backward=True what fails in backward
        has updated some parameters, and then every call but `load` raises InputError.
        """
        state = self.state
        checked, rows = rows_of_rank(state, batch, self.batch)
        parts = self.gradients.micro_batches(checked, rows)
        rate = self.optimizer.lr * self.schedule.share(self.steps + 1)
        updating = (
            nullcontext()
            if self.in_backward is None
            else self.in_backward.during(self.optimizer, rate, checked)
        )
        # the graph takes part in all collectives, even where it fails
        with updating, state.ranks.fail_together():
            with (
                _seeded(self.seed, self.steps, state.ranks.rank, state.device),
                self.rules.drawn(self.steps, self.seed),
            ):
                result = self.gradients.run(parts)
            count = counted(result.count)
            loss = float(result.loss) / count
            means = self.update.means(result.gradients, count)
            found = self.guard.found(loss, means, checked)
        scale, skipped = self.guard.scale, self.guard.skips(found, loss, checked)
        norm = None
        if not skipped:
            self.rules.add(means, self.steps)
            self._inspector.see(means)
            self.gradients.keep(result)
            norm = None if self.clip_norm is None else self.update.clip(means, self.clip_norm)
            self.update.run(self.optimizer, means, rate)
        self.steps += 1
        self.rules.after(self.steps)
        whole = int(count) if count.is_integer() else count
        return StepResult(self.steps, loss, whole, rate, norm, skipped, scale)

    @property
    def plan(self) -> StepPlan:
        """What this rank holds and sends in a step on the example, predicted: nothing is computed or sent. Prints as a table.

        Not collective. Raises InputError if the program has no example.
        """
        return plan_step(
            self.state, self.optimizer, self.clip_norm, None, self.batch, self.accumulate,
            groups_of(self.state, self.optimizer), self.in_backward is not None,
        )  # fmt: skip

    def fit(
        self,
        loader: Iterable[Mapping[str, object]],
        steps: int,
        *,
        eval: Iterable[Mapping[str, object]] | None = None,
        eval_every: int | None = None,
        save: str | Path | None = None,
        save_every: int | None = None,
        resume: str | Path | None = None,
        keep: int | None = None,
        metrics: str | Path | None = None,
        tensorboard: str | Path | None = None,
        log_every: int = 10,
        inspect: str | Sequence[str] = (),
        save_wait: bool = True,
        measure: RowMeasure | RunMeasure | None = None,
        best: str | None = None,
        patience: int | None = None,
    ) -> Fitted:
        """Train over a loader, any iterable of batches as `step` takes them, until this trainer has made `steps` steps.

        The loader is read again for each epoch, after `set_epoch` where it or its `sampler` has that. Progress goes to the
        error stream, every `log_every` steps where it is no terminal.

        eval: batches for `evaluate`, every `eval_every` steps and after the last. save: a folder of checkpoints, written
        every `save_every` steps, after the last and on Ctrl-C or SIGTERM, which let a step be completed; the newest `keep`
        of them stay. save_wait: whether steps wait until a checkpoint is written; without it a copy is written beside the
        next steps, and the last ones are waited for. resume: "auto" goes on from the newest whole checkpoint in `save`, if
        there is one; or the path of a checkpoint. Step, data and random generators go on where they were: a loader with
        `state_dict` and `load_state_dict` by them, another one is read forward, which is told. metrics: a file of JSON
        lines, by default `metrics.jsonl` in `save`. tensorboard: a folder, by default one in `save` where TensorBoard is
        installed. inspect: globs of parameters, whose figures (see the method `inspect`) are in the metrics every
        `log_every` steps. measure: what `eval` measures beside the loss, see `evaluate`, or a `RunMeasure` of the trainer itself. best: the figure by which evaluations
        are compared, "loss" (by default) or one of the measure's, such as "accuracy"; with `save` each better step is saved,
        and the best one stays beside the newest `keep`. patience: stop after so many evaluations without a better one.

        Raises InputError for options that are not valid, a `save` folder with checkpoints of another run, and as `step` does;
        BundleError as `load` and `save` do.
        """
        places = (None if path is None else Path(path) for path in (save, metrics, tensorboard))
        folder, file, board = places
        options = FitOptions(
            steps,
            eval_every,
            folder,
            save_every,
            resume,
            keep,
            file,
            board,
            log_every,
            (inspect,) if isinstance(inspect, str) else tuple(inspect),
            save_wait,
            best,
            patience,
            eval,
            measure,
        )
        return fit(self, loader, options)

    @together
    def evaluate(
        self, loader: Iterable[Mapping[str, object]], measure: RowMeasure | None = None
    ) -> Evaluation:
        """The mean loss over all items of a loader's batches, in eval form: no dropout, and buffers stay as they are.

        Of a loss of several terms each is a mean over its own items of all batches. What is no mean over items (the balance of a
        router), and a loss over gathered rows (`Torch(gather=)`), is computed for each batch and averaged over these; the report
        names it.

        It reads the trainer's own tensors, as they are split over ranks, and keeps no copy of them. Batches are given as
        `step` takes them; with batch="rank" ranks may have different numbers of them. `measure`: what is measured beside the
        loss, such as `task.measure` of a classification.

        Raises InputError as `step` does, if there is no batch, and for a `measure` where the model computes its loss itself.
        """
        if self._evaluator is None or self._evaluator.measure is not measure:
            self._evaluator = Evaluator(self, measure)
        return self._evaluator.run(loader)

    @together
    def inspect(self, *patterns: str) -> Inspection:
        """Mean, standard deviation and gradient norm of the parameters that globs fit, by name or module path ("*.q_proj"), all
        by default; prints as a table.

        Gradient norms are those of the last step, before clipping. They are taken from the first `inspect` on: that one has
        none, unless `fit(inspect=)` or a call before the step asked for them.

        Raises InputError for a glob that fits no parameter.
        """
        return self._inspector.take(patterns or "*", self.update, self.steps)

    @together
    def program(self) -> Program:
        """The trained program, whole on every rank; trained parameters and buffers are copies, in the program's dtypes."""
        state = self.state
        program = state.outline.clone()
        tensors: dict[str, torch.Tensor] = {}
        for name, place in state.places.items():
            if name.startswith(CONSTANT):
                continue
            trained = name in state.updates
            held, tensor = self.update.saved(name) if trained else (place, state.tensors[name])
            for part, whole in held.join(tensor, state.ranks).items():
                rounded = whole.to(program.tensor(part).dtype)
                changes = trained or held.packed or part in program.buffers
                tensors[part] = rounded.clone() if changes else rounded
        program.parameters = {name: tensors[name] for name in program.parameters}
        if set(backbone_of(program)) & state.trained_parameters:
            program.fingerprint = fingerprint(backbone_of(program))
        program.buffers = {name: state.ranks.broadcast(tensors[name]) for name in program.buffers}
        propagate(program, everything=True)  # the outline's nodes describe values on the meta device
        return split(program, self.parts)

    @together
    def save_delta(self, path: str | Path) -> None:
        """Write the deltas alone, as a folder that `LoadDelta`, `Deltas` and PEFT read; rank 0 writes.

        Raises BundleError or InputError, on all ranks, if there is no delta or it cannot be written.
        """
        program = self.program()
        with self.state.ranks.on_rank0() as first:
            if first:
                save_adapter(program, path)

    @together
    def save_pretrained(self, path: str | Path, like: str | Path) -> None:
        """Write the trained weights as a Hugging Face folder, see `Program.save_pretrained`; rank 0 writes.

        Raises InputError or BundleError, on all ranks, if it cannot be written.
        """
        program = self.program()
        with self.state.ranks.on_rank0() as first:
            if first:
                program.save_pretrained(path, like)

    @together
    def save(self, path: str | Path, wait: bool = True) -> None:
        """Write a checkpoint: trained parameters, buffers, optimizer state and step, for any number of ranks to resume.

        Each rank writes its share; the folder is there as a whole or not at all. With `wait=False` a copy of the share is
        written while training goes on; the next `save`, `wait` and the end of the process wait for it.

        Raises BundleError, on all ranks, if it cannot be written; then nothing is left behind. With `wait=False` the next
        call of the trainer raises it.
        """
        save_trainer(self, Path(path), wait)

    @together
    def wait(self) -> None:
        """Wait until a checkpoint that `save(path, wait=False)` began is written.

        Raises BundleError, on all ranks, if it could not be written.
        """
        self.saver.wait()
        check_saved(self)

    @together
    def load(self, path: str | Path) -> None:
        """Resume from a checkpoint of the same program, saved by any number of ranks.

        Raises BundleError, on all ranks and before anything changes, if the checkpoint is damaged or of another program.
        """
        load_trainer(self, Path(path))
        if self.in_backward is not None:
            self.in_backward.failed = ""


@contextmanager
def _seeded(seed: int, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Seed torch from the seed, step and rank alone; restores the caller's random state afterwards."""
    mixed = int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:7], "big")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(mixed)
        yield
