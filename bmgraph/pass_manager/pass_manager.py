"""Runs passes in order, with the chores around each: verification, drift, cost, history, observers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bmgraph.analysis.cost_model import cost
from bmgraph.analysis.input_kinds import known_kinds
from bmgraph.analysis.value_ranges import with_value_ranges
from bmgraph.errors import (
    BmgraphError,
    DriftError,
    InputError,
    MisplacedError,
    OrderError,
    PassError,
    VerificationError,
)
from bmgraph.ir.editor import remove_dead
from bmgraph.ir.pass_record import Record, machine
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import dims, fixed_sizes, propagate
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.ir.verifier import check_program
from bmgraph.pass_manager.context import CALIBRATION, Context, TrainInPass
from bmgraph.pass_manager.observers import Observer
from bmgraph.pass_manager.ordering import check_order, offer
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.pass_manager.target import TORCH, Target
from bmgraph.utils.progress import working
from bmgraph.verify.changed_rows import batch_of_changed_rows
from bmgraph.verify.proof import Proof
from bmgraph.verify.reference_outputs import Batch, Reference, comparison_batch, exact_bounds
from bmgraph.verify.training_form import check_gradients, check_training_form
from bmgraph.verify.unnamed_changes import Snapshot, check_unnamed
from bmgraph.verify.weight_only_check import check_weight_only

Verify = Literal["off", "structure", "numeric"]
"""off: nothing is checked; structure: the program is legal after every pass; numeric: outputs are compared too."""

LEVELS = ("off", "structure", "numeric")


def provided(program: Program) -> set[str]:
    """What the passes in a program's history provide."""
    return {name for record in program.history for name in record.provides}


@dataclass
class PassManager:
    """One run of passes over one program.

    `max_drift` bounds the drift (relative L2) of every approximate pass and of all together, in place of each pass's own
    bound. `trainer` is what passes train with.
    Raises InputError for an unknown level of `verify`.
    """

    resources: Mapping[str, object] = field(default_factory=dict)
    max_drift: float | None = None
    verify: Verify = "numeric"
    target: Target = TORCH
    observers: Sequence[Observer] = ()
    trainer: TrainInPass | None = None
    trains: bool = False
    """Whether the program will be trained: gradients are compared then, too."""
    _first: Reference | None = field(default=None, init=False)
    """Outputs of the first program: cumulative drift is measured from them."""
    _last: Reference | None = field(default=None, init=False)
    """Outputs after the last pass: the drift of the next one is measured from them."""

    def __post_init__(self) -> None:
        if self.verify not in LEVELS:
            raise InputError(f"verify={self.verify!r}: choose one of {', '.join(map(repr, LEVELS))}")

    def run(self, passes: Sequence[ModelPass], program: Program) -> Program:
        """The program after all passes; the given one is left as it was.

        Raises OrderError before anything runs where the contracts forbid the order, and where a pass finds that it has
        to run first; VerificationError or DriftError naming the pass that broke its contract; PassError and
        ResourceError where a pass cannot run.
        """
        check_order(passes, has=provided(program))
        given = program = known_kinds(program)
        for index, item in enumerate(passes):
            try:
                program = self._run_one(item, program)
            except MisplacedError as error:
                reordered = (item, *passes[:index], *passes[index + 1 :])
                if reordered == tuple(passes) or not self._can_begin(reordered, given):
                    raise
                raise OrderError(f"{error}; {offer(reordered)}") from error
        return program

    def _can_begin(self, passes: Sequence[ModelPass], program: Program) -> bool:
        """Whether the first of the passes runs on the given program, and the contracts let the others follow it."""
        try:
            check_order(passes, has=provided(program))
            replace(self, verify="off", observers=())._run_one(passes[0], program)
        except BmgraphError:
            return False
        return True

    def _run_one(self, item: ModelPass, program: Program, within: str = "") -> Program:
        """Run one pass with all chores around it; `within` is the text of the pass that runs it as a part of itself."""
        begin = time.perf_counter()
        self._take_reference(program)
        context = Context(
            dict(self.resources),
            self.target,
            trainer=self.trainer,
            proves=self._compares(program),
        )
        nested, snapshots = [program], [Snapshot.of(program)]

        def run_nested(inner: ModelPass, given: Program) -> Program:
            nested.append(self._run_one(inner, given, within=str(item)))
            snapshots.append(Snapshot.of(nested[-1]))
            return nested[-1].clone()

        context.nested = run_nested
        for name in item.resources:
            if not context.has(name):
                context.resource(name)
        start = self._last
        after = self._rewrite(item, program, context)
        record = Record(
            text=str(item), effect=item.effect, edits=tuple(context.edits), declined=tuple(context.declines),
            before=cost(program), after=cost(after), provides=tuple(sorted(item.provides)),
            resources=dict(context.digests), inputs=_added_inputs(program, after), within=within, target=self.target.name, machine=machine(),
        )  # fmt: skip
        step = _Step(item, program, nested[-1], after, context, snapshots[-1], start)
        record = self._verify(step, record)
        after.history = (*after.history, record)
        for observer in self.observers:
            observer.after(item, program, after, record, time.perf_counter() - begin)
        return after

    def _rewrite(self, item: ModelPass, program: Program, context: Context) -> Program:
        """What the pass makes of a clone; raises MisplacedError where it edits nothing and that is an error."""
        with working(f"running {item}"):
            try:
                after = item.run(program.clone(), context)
                if not isinstance(after, Program):
                    raise PassError(f"it returned a {type(after).__name__}, not a program")
                _tidy(after)
            except BmgraphError as error:
                raise type(error)(f"pass {item}: {error}") from error
        if not context.edits and not item.may_match_nothing:
            reasons = "; ".join(f"{edit.site}: {edit.what}" for edit in context.declines[:3])
            raise MisplacedError(
                f"pass {item} changed nothing"
                + (f" ({reasons})" if reasons else ": no site of the program fits it")
            )
        return after

    def _compares(self, program: Program) -> bool:
        return self.verify == "numeric" and program.device.type != "meta" and bool(program.example)

    def _take_reference(self, program: Program) -> None:
        if self._last is None and self._compares(program):
            self._last = Reference.take(program, self._batch(program))
            self._first = self._last.without_probe()

    def _batch(self, program: Program) -> Batch:
        """The first calibration batch where there is one, since activations are scaled for such data."""
        return comparison_batch(program, self.resources.get(CALIBRATION))

    def _verify(self, step: _Step, record: Record) -> Record:
        """The record with what was measured."""
        if self.verify == "off":
            return record
        item, before, after = step.item, step.before, step.after
        try:
            check_program(after)
            _check_free_sizes(before, after, item.effect)
            if item.effect != "intended":
                _check_output_names(before, after)
            check_unnamed(step.base, after, record.edits, item.changes, step.snapshot)
            if step.start is None or not self._compares(after):
                return record
            return self._compare(step, record, step.start)
        except MisplacedError:
            raise
        except PassError as error:  # the pass does not fit the model, as its own proof found
            raise PassError(f"pass {item}: {error}") from error
        except BmgraphError as error:
            kind = DriftError if isinstance(error, DriftError) else VerificationError
            raise kind(f"pass {item} was stopped: {error}") from error
        except (RuntimeError, IndexError, TypeError, AttributeError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise VerificationError(
                f"pass {item} was stopped: the program no longer runs: {first}"
            ) from error

    def _compare(self, step: _Step, record: Record, start: Reference) -> Record:
        assert self._first is not None
        assert self._last is not None
        item, after = step.item, step.after
        if item.effect == "intended":
            item.prove(step.base, after, Proof(self._last), step.context)
            self._last = Reference.take(after, self._batch(after))
            self._first = self._last.without_probe()
            return replace(record, compared="taken anew")
        now = start.rerun(after)
        moved, total = start.drift_to(now), self._first.drift_to(now)
        if item.effect == "exact":
            beyond = start.beyond(now, exact_bounds(step.before))
            if beyond:
                raise VerificationError(f"it is declared exact, but {beyond}")
            rare = batch_of_changed_rows(step.before, after, start.batches[0])
            if rare is not None:
                Proof(replace(start, batches=[rare], outputs=[])).same(
                    step.before, after, "it is declared exact"
                )
            check_training_form(step.before, after, start)
            if self.trains:
                check_gradients(step.before, after, start.batches[0])
        else:
            bound = item.default_drift if self.max_drift is None else self.max_drift
            _check_drift(moved.error, bound, "by this pass", moved.output)
            if self.max_drift is not None:
                _check_drift(total.error, bound, "since the first program", moved.output)
            if item.measured is not None:
                check_weight_only(step.base, after, str(item), self._last, item.measured)
        item.prove(step.base, after, Proof(self._last), step.context)
        self._last = now
        return replace(
            record,
            drift=moved.error,
            cumulative=total.error,
            cosine=total.cosine,
            compared=now.describe(probe=item.effect == "exact"),
        )


@dataclass(frozen=True)
class _Step:
    """One run of a pass: the program before and after it, and what its checks need.

    `base` is the program after the last pass that this one ran as a part of itself (else `before`), `snapshot` of it;
    `start` are the outputs before the pass.
    """

    item: ModelPass
    before: Program
    base: Program
    after: Program
    context: Context
    snapshot: Snapshot
    start: Reference | None


def _tidy(program: Program) -> None:
    """Infer shapes, remove dead code, and let the specs say what the graph takes and returns."""
    propagate(program)
    remove_dead(program)
    program.inputs = with_value_ranges(program)
    if program.encoder is not None:
        program.encoder.inputs = with_value_ranges(program.encoder)
    values: Any = output_node(program.graph).args[0]
    program.outputs = tuple(
        TensorSpec(spec.name, node.meta["val"].dtype, dims(program, node.meta["val"]))
        for spec, node in zip(program.outputs, values)
    )


def _added_inputs(before: Program, after: Program) -> tuple[str, ...]:
    known = {spec.name for spec in before.inputs}
    return tuple(spec.name for spec in after.inputs if spec.name not in known)


def _check_output_names(before: Program, after: Program) -> None:
    names = [spec.name for spec in before.outputs]
    if names != [spec.name for spec in after.outputs]:
        raise VerificationError(f"the outputs are no longer {', '.join(names)}")


def _check_free_sizes(before: Program, after: Program, effect: str) -> None:
    """Raise VerificationError if a size that was dynamic before a pass is fixed after it."""
    fixed = fixed_sizes(after)
    if fixed:
        found = ", ".join(f"{name} = {size}" for name, size in fixed.items())
        raise VerificationError(f"it works for {found} only: a pass must not fix a dynamic size")
    old = {spec.name: spec for spec in (*before.inputs, *(() if effect == "intended" else before.outputs))}
    for spec in (*after.inputs, *after.outputs):
        known = old.get(spec.name)
        if known is None or len(known.shape) != len(spec.shape):
            continue
        for axis, (was, now) in enumerate(zip(known.shape, spec.shape)):
            if isinstance(was, str) and isinstance(now, int):
                raise VerificationError(
                    f"it fixes size {axis} of {spec.name}, {was} before, to {now}: a pass must not fix a dynamic size"
                )


def _check_drift(error: float, bound: float, since: str, output: str) -> None:
    if not error <= bound:
        raise DriftError(
            f"the outputs drifted by {error:.3f} {since}, more than {bound:g} (max_drift); worst in {output}"
        )
