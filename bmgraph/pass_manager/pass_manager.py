"""Running passes in order, with the chores around each: contracts, verification, drift, cost, history."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from bmgraph.analysis.cost_model import cost
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
from bmgraph.ir.shape_inference import dims, propagate
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.ir.verifier import check_program
from bmgraph.pass_manager.context import CALIBRATION, Context
from bmgraph.pass_manager.ordering import check_order, offer
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.pass_manager.target import TORCH, Target
from bmgraph.utils.progress import working
from bmgraph.verify.reference_outputs import Batch, Reference, comparison_batch, exact_bound
from bmgraph.verify.weight_only_check import check_skeleton

Verify = Literal["off", "structure", "numeric"]
"""off: nothing is checked; structure: the program is legal after every pass; numeric: outputs are compared too."""

LEVELS = ("off", "structure", "numeric")


class Observer(Protocol):
    """Told of every pass when it has run and been checked."""

    def after(self, item: Pass, before: Program, program: Program, record: Record, seconds: float) -> None:
        """One pass: the program before and after it, its record, and how long it took with its checks."""


@dataclass
class Timing:
    """Keeps the seconds of every pass."""

    seconds: list[tuple[str, float]] = field(default_factory=list)

    def after(self, item: Pass, before: Program, program: Program, record: Record, seconds: float) -> None:
        self.seconds.append((str(item), seconds))


@dataclass
class OperatorDiff:
    """Keeps how many calls of each operator every pass added or took away."""

    changes: list[tuple[str, dict[str, int]]] = field(default_factory=list)

    def after(self, item: Pass, before: Program, program: Program, record: Record, seconds: float) -> None:
        old, new = _operators(before), _operators(program)
        names = sorted({*old, *new})
        self.changes.append(
            (str(item), {n: new.get(n, 0) - old.get(n, 0) for n in names if new.get(n, 0) != old.get(n, 0)})
        )


@dataclass
class Dump:
    """Writes the text of every program, and its difference to the one before, to a folder."""

    folder: Path
    count: int = 0

    def after(self, item: Pass, before: Program, program: Program, record: Record, seconds: float) -> None:
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        old, new = str(before), str(program)
        stem = f"{self.count:02d}-{item.name}"
        (folder / f"{stem}.txt").write_text(new, encoding="utf-8")
        difference = difflib.unified_diff(old.splitlines(True), new.splitlines(True), "before", "after", n=2)
        (folder / f"{stem}.diff").write_text("".join(difference), encoding="utf-8")
        self.count += 1


def _operators(program: Program) -> dict[str, int]:
    from bmgraph.ir.printer import target_text

    counts: dict[str, int] = {}
    for graph in program.graphs.values():
        for node in graph.nodes:
            if node.op == "call_function":
                name = target_text(node.target)
                counts[name] = counts.get(name, 0) + 1
    return counts


class Pipeline:
    """Passes in the order that they run in.

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import Quantize
        >>> program = bg.capture(torch.nn.Linear(64, 64), (torch.randn(4, 64),))
        >>> small = bg.Pipeline([Quantize("int8", activations="none")]).run(program)
        >>> small.history[-1].text
        'quantize{activations=none}'
    """

    def __init__(self, passes: Sequence[Pass], observers: Sequence[Observer] = ()) -> None:
        self.passes = tuple(passes)
        self.observers = tuple(observers)

    def run(
        self,
        program: Program,
        *,
        calibration: Iterable[Batch] | None = None,
        resources: Mapping[str, Any] | None = None,
        max_drift: float | None = None,
        verify: Verify = "numeric",
        target: Target | None = None,
    ) -> Program:
        """The program after all passes; the given one is left as it was.

        `calibration` is short for `resources["calibration"]`. `max_drift` bounds the drift of every approximate
        pass and of all together (relative L2), in place of each pass's own bound.

        Raises OrderError before anything runs where the order cannot be right, VerificationError or DriftError
        naming the pass where one broke what it keeps, PassError and ResourceError where one cannot run.
        """
        if verify not in LEVELS:
            raise InputError(f"verify={verify!r}: choose one of {', '.join(map(repr, LEVELS))}")
        check_order(self.passes, has=provided(program))
        given = dict(resources or {})
        if calibration is not None:
            given[CALIBRATION] = calibration
        run = _Run(self.observers, given, max_drift, verify, target or TORCH)
        return run.all(self.passes, program)


def _added_inputs(before: Program, after: Program) -> tuple[str, ...]:
    known = {spec.name for spec in before.inputs}
    return tuple(spec.name for spec in after.inputs if spec.name not in known)


def provided(program: Program) -> set[str]:
    """What the passes in a program's history gave it."""
    return {name for record in program.history for name in record.provides}


class _Run:
    """One run of a pipeline: what programs are compared with, and what holds for every pass."""

    def __init__(
        self,
        observers: Sequence[Observer],
        resources: dict[str, Any],
        max_drift: float | None,
        verify: Verify,
        target: Target,
    ) -> None:
        self.observers = observers
        self.resources = resources
        self.max_drift = max_drift
        self.verify = verify
        self.target = target
        self.first: Reference | None = None
        self.last: Reference | None = None

    def all(self, passes: Sequence[Pass], program: Program) -> Program:
        given = program
        for place, item in enumerate(passes):
            try:
                program = self.one(item, program)
            except MisplacedError as error:
                first = (item, *passes[:place], *passes[place + 1 :])
                if first == tuple(passes) or not self._can_begin(first, given):
                    raise
                raise OrderError(f"{error}; {offer(first)}") from error
        return program

    def _can_begin(self, passes: Sequence[Pass], program: Program) -> bool:
        """Whether the first of the passes runs on the program that all were given, and the others may follow it."""
        try:
            check_order(passes, has=provided(program))
            _Run((), self.resources, self.max_drift, "off", self.target).one(passes[0], program)
        except BmgraphError:
            return False
        return True

    def _compares(self, program: Program) -> bool:
        return self.verify == "numeric" and program.device.type != "meta" and bool(program.example)

    def _take_reference(self, program: Program) -> None:
        """On the first calibration batch where there is one: activations are scaled for such data."""
        if self.last is None and self._compares(program):
            self.first = self.last = Reference.take(program, self._batch(program))

    def _batch(self, program: Program) -> Batch:
        return comparison_batch(program, self.resources.get(CALIBRATION))

    def one(self, item: Pass, program: Program, within: str = "") -> Program:
        """Run one pass and all the chores around it."""
        begin = time.perf_counter()
        self._take_reference(program)
        context = Context(dict(self.resources), self.target)
        bases = [program]

        def run_nested(inner: Pass, given: Program) -> Program:
            bases.append(self.one(inner, given, within=str(item)))
            return bases[-1].clone()

        context.nested = run_nested
        for name in item.resources:
            if not context.has(name):
                context.resource(name)
        start = self.last
        with working(f"running {item}"):
            try:
                after = item.run(program.clone(), context)
                if not isinstance(after, Program):
                    raise PassError(f"it returned a {type(after).__name__}, not a program")
                after = self._tidy(after)
            except BmgraphError as error:
                raise type(error)(f"pass {item}: {error}") from error
        if not context.edits and not item.may_match_nothing:
            reasons = "; ".join(f"{edit.site}: {edit.what}" for edit in context.declines[:3])
            raise MisplacedError(
                f"pass {item} changed nothing"
                + (f" ({reasons})" if reasons else ": no site of the program fits it")
            )
        record = Record(
            text=str(item), effect=item.effect, edits=tuple(context.edits), declined=tuple(context.declines),
            before=cost(program), after=cost(after), provides=tuple(sorted(item.provides)),
            resources=dict(context.digests), inputs=_added_inputs(program, after), within=within, target=self.target.name, machine=machine(),
        )  # fmt: skip
        record = self._verify(item, (program, bases[-1]), after, record, start)
        after.history = (*after.history, record)
        for observer in self.observers:
            observer.after(item, program, after, record, time.perf_counter() - begin)
        return after

    def _tidy(self, program: Program) -> Program:
        """Dead code, metadata and the types of the outputs."""
        propagate(program)
        remove_dead(program)
        values: Any = output_node(program.graph).args[0]
        program.outputs = tuple(
            TensorSpec(spec.name, node.meta["val"].dtype, dims(program, node.meta["val"]))
            for spec, node in zip(program.outputs, values)
        )
        return program

    def _verify(
        self,
        item: Pass,
        steps: tuple[Program, Program],
        after: Program,
        record: Record,
        start: Reference | None,
    ) -> Record:
        """`steps` are the program before the pass and after the last pass that it ran within itself."""
        before = steps[0]
        if self.verify == "off":
            return record
        try:
            check_program(after)
            if item.effect != "intended" and [s.name for s in before.outputs] != [
                s.name for s in after.outputs
            ]:
                raise VerificationError(
                    "the outputs are no longer " + ", ".join(spec.name for spec in before.outputs)
                )
            if item.effect == "exact":
                self._same_types(before, after)
            if self.last is None or not self._compares(after):
                return record
            return self._compare(item, steps, after, record, start)
        except BmgraphError as error:
            kind = DriftError if isinstance(error, DriftError) else VerificationError
            raise kind(f"pass {item} was stopped: {error}") from error
        except (RuntimeError, IndexError, TypeError, AttributeError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise VerificationError(
                f"pass {item} was stopped: the program no longer runs: {first}"
            ) from error

    def _same_types(self, before: Program, after: Program) -> None:
        for old, new in zip(before.outputs, after.outputs):
            if old.dtype != new.dtype or len(old.shape) != len(new.shape):
                raise VerificationError(f"output {old} became {new}")

    def _compare(
        self,
        item: Pass,
        steps: tuple[Program, Program],
        after: Program,
        record: Record,
        start: Reference | None,
    ) -> Record:
        before, base = steps
        assert self.first is not None
        assert self.last is not None
        assert start is not None
        if item.effect == "intended":
            self.first = self.last = Reference.take(after, self._batch(after))
            return replace(record, compared="taken anew")
        now = start.again(after)
        moved, total = start.drift_to(now), self.first.drift_to(now)
        if item.effect == "exact" and not moved.error <= exact_bound(before):
            raise VerificationError(
                f"it is declared exact, but {moved.output} moved by {moved.error:.1e} (relative), more than rounding ({exact_bound(before):.0e})"
            )
        if item.effect == "approximate":
            bound = item.default_drift if self.max_drift is None else self.max_drift
            for error, what in ((moved.error, "by this pass"), (total.error, "since the first program")):
                if what != "by this pass" and self.max_drift is None:
                    continue
                if not error <= bound:
                    raise DriftError(
                        f"the outputs drifted by {error:.3f} {what}, more than {bound:g} (max_drift); worst in {moved.output}"
                    )
            if item.weight_drift is not None:
                check_skeleton(base, after, str(item), self.last, item.weight_drift)
        self.last = now
        return replace(
            record, drift=moved.error, cumulative=total.error, cosine=total.cosine, compared=now.describe()
        )
