"""Runs passes of either stage in order, with the chores around each: verification, drift, cost, history, observers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Generic, TypeVar, overload

from bmgraph.errors import (
    BmgraphError,
    DriftError,
    MisplacedError,
    OrderError,
    PassError,
    VerificationError,
)
from bmgraph.ir.pass_record import Record, machine
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context, Trial
from bmgraph.pass_manager.engine_trials import TrialEngine
from bmgraph.pass_manager.model_rules import ModelRules
from bmgraph.pass_manager.ordering import check_order, holds, offer, without
from bmgraph.pass_manager.pass_base import ModelPass, Pass
from bmgraph.pass_manager.pass_spec import recorded_text
from bmgraph.pass_manager.resume_folder import ResumeFolder, Work
from bmgraph.pass_manager.resumed_passes import ResumedPasses
from bmgraph.pass_manager.run_settings import RunSettings
from bmgraph.pass_manager.stage_rules import Change, Mark, Rewriter, StageRules, Subject
from bmgraph.pass_manager.step_rules import StepRules
from bmgraph.training.step_program import StepProgram
from bmgraph.utils.progress import working

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class PassManager(RunSettings):
    """Runs passes with these settings: those of the model stage on a program, those of the step stage on its step."""

    @overload
    def run(
        self, passes: Sequence[Pass], subject: Program, folder: ResumeFolder | None = None
    ) -> Program: ...

    @overload
    def run(self, passes: Sequence[Pass], subject: StepProgram) -> StepProgram: ...

    def run(
        self, passes: Sequence[Pass], subject: Program | StepProgram, folder: ResumeFolder | None = None
    ) -> Program | StepProgram:
        """The program, or the step, after all passes. A given program is left as it was; a given step is not to be used
        again, since passes take its tensors. What passes finish of a program is kept in a `folder`, and taken from there.

        Raises InputError where the folder is of other work, OrderError before anything runs where the contracts forbid the order, and where a pass finds that it has
        to run first; VerificationError or DriftError naming the pass that broke its contract; PassError and
        ResourceError where a pass cannot run.
        """
        if isinstance(subject, Program):
            if folder is not None:
                resumed = ResumedPasses(folder, self)
                return _Run(resumed.settings, resumed.rules, resumed=resumed).run(passes, subject)
            return _Run(self, ModelRules(self)).run(passes, subject)
        return _Run(self, StepRules(self)).run(passes, subject)

    def consult(
        self,
        passes: Sequence[ModelPass],
        place: int,
        subject: Program,
        ask: Callable[[Program, Context], Answer],
    ) -> Answer:
        """What `ask` says of the program and the context that the pass at a place would run with, once those before it have run.

        Raises what `run` raises until then.
        """
        return _Run(self, ModelRules(self)).consult(passes, place, subject, ask)


def provided(history: Sequence[Record]) -> set[str]:
    """What the passes in a history provide."""
    return {name for record in history for name in record.provides}


@dataclass
class _Told:
    """An observer that keeps what it is told, for those who are told once a trial is settled for."""

    calls: list[tuple[Pass, Program | StepProgram, Program | StepProgram, Record, float]] = field(
        default_factory=list
    )

    def after(
        self,
        item: Pass,
        before: Program | StepProgram,
        program: Program | StepProgram,
        record: Record,
        seconds: float,
    ) -> None:
        self.calls.append((item, before, program, record, seconds))


class _Run(Generic[Subject, Rewriter, Mark]):
    """One run of passes of one stage."""

    def __init__(
        self,
        settings: RunSettings,
        rules: StageRules[Subject, Rewriter, Mark],
        told: _Told | None = None,
        resumed: ResumedPasses | None = None,
        work: Work | None = None,
    ) -> None:
        self.settings, self.rules, self.told = settings, rules, told
        self.resumed, self.work = resumed, work

    def run(self, passes: Sequence[Pass], subject: Subject) -> Subject:
        """The subject after all passes."""
        has = provided(self.rules.history(subject))
        check_order(passes, has=has, resources=self.settings.resources, added=self.settings.added)
        items = [self._own(item) for item in passes]
        subject = self.rules.prepared(subject)
        if not items:
            return subject
        subject = self.rules.opened(subject)
        done = self._run_all(items, subject, len(items), has)
        return self.rules.closed(done)  # by the rules that a trial may have put in place of those before it

    def consult(
        self, passes: Sequence[Pass], place: int, subject: Subject, ask: Callable[[Subject, Context], Answer]
    ) -> Answer:
        """What `ask` says of the subject and the context that the pass at a place would run with."""
        has = provided(self.rules.history(subject))
        check_order(passes, has=has, resources=self.settings.resources, added=self.settings.added)
        items = [self._own(item) for item in passes]
        subject = self.rules.opened(self.rules.prepared(subject))
        subject = self._run_all(items, subject, place, has)
        context, _ = self._context(items[place], subject, items[place + 1 :])
        for name in items[place].resources:
            context.resource(name)
        return ask(self.rules.given(subject), context)

    def _run_all(self, items: Sequence[Rewriter], subject: Subject, count: int, has: set[str]) -> Subject:
        """The subject after the first `count` of the passes."""
        first = self.rules.before(subject)
        resumed, begin = self.resumed, 0
        if resumed is not None:
            begin, subject = resumed.begin(items, first)  # type: ignore[assignment, arg-type]  # of the model stage
        for index, item in enumerate(items[:count]):
            if index < begin:
                continue
            work = None if resumed is None else resumed.work(index, item)
            try:
                subject = self._run_one(item, subject, following=items[index + 1 :], work=work)
                if resumed is not None:
                    resumed.finished(index, subject, self.rules)  # type: ignore[arg-type]
            except MisplacedError as error:
                reordered = (item, *items[:index], *items[index + 1 :])
                asked = without(reordered, self.settings.added)
                same = asked == without(items, self.settings.added)
                if index == 0 or same or not holds(reordered, has) or not self._fits(item, first):
                    raise
                raise OrderError(f"{error}; {offer(asked)}") from error
        return subject

    def _own(self, item: Pass) -> Rewriter:
        if not isinstance(item, self.rules.item_kind):
            raise OrderError(
                f"pass {item} is of the {item.acts_on} stage, and cannot run on a {self.rules.noun}: give all passes to "
                "bg.compile, which runs each at its stage"
            )
        return item

    def _fits(self, item: Rewriter, subject: Subject) -> bool:
        """Whether a pass says that it was made for a subject, without running it."""
        context = Context(dict(self.settings.resources), self.settings.target)
        try:
            return self.rules.fits(item, subject, context)
        except BmgraphError:
            return False

    def _run_one(
        self,
        item: Rewriter,
        subject: Subject,
        within: str = "",
        following: Sequence[Rewriter] = (),
        resources: Mapping[str, object] = MappingProxyType({}),
        work: Work | None = None,
    ) -> Subject:
        """Run one pass with all chores around it; `within` is the text of the pass that runs it as a part of itself,
        `following` are the passes after it, `resources` those that it has beside the given ones, `work` is where it keeps what it
        finds."""
        begin = time.perf_counter()
        rules, settings = self.rules, self.settings
        context, bases = self._context(item, subject, following, resources, work)
        before, start = bases[0]
        for name in item.resources:
            if not context.has(name):
                context.resource(name)
        cost = rules.cost(before)
        after = self._rewrite(item, subject, context)
        if isinstance(context.settled, Trial):
            return self._adopted(item, before, context.settled)
        record = Record(
            text=recorded_text(context.settled or item), effect=item.promises, stage=item.acts_on, edits=tuple(context.edits), declined=tuple(context.declines),
            before=cost, after=rules.cost(after), provides=tuple(sorted(item.provides)), resources=dict(context.digests),
            inputs=rules.added_inputs(before, after), within=within, target=settings.target.text, machine=machine(),
            saves=item.saves,
        )  # fmt: skip
        base, base_mark = bases[-1]
        record = self._verified(Change(item, before, start, base, base_mark, after, context), record)
        rules.keep(after, record)
        for observer in settings.observers:
            observer.after(item, before, after, record, time.perf_counter() - begin)
        return after

    def _context(
        self,
        item: Rewriter,
        subject: Subject,
        following: Sequence[Rewriter],
        resources: Mapping[str, object] = MappingProxyType({}),
        work: Work | None = None,
    ) -> tuple[Context, list[tuple[Subject, Mark]]]:
        """The context of a pass on a subject, and the subjects that it may be compared with: this one, and those after the passes
        that it runs as parts of itself."""
        rules, settings = self.rules, self.settings
        start = rules.mark(subject)
        bases = [(rules.before(subject), start)]

        def run_nested(inner: Pass, given: object, more: Mapping[str, object]) -> Subject:
            if not isinstance(given, rules.kind):
                raise PassError(f"it runs {inner} on a {type(given).__name__}, not on a {rules.noun}")
            own = self._own(inner)
            place = None if work is None else work.run(recorded_text(own))
            lent = {**resources, **more}
            done = self._run_one(own, given, within=recorded_text(item), resources=lent, work=place)
            bases.append((rules.before(done), rules.mark(done)))
            return rules.given(done)

        context = Context(
            {**settings.resources, **resources},
            settings.target,
            nested=run_nested,
            trainer=settings.trainer,
            proves=rules.compares(subject),
            following=following,
            provided=frozenset(provided(rules.history(subject))),
            tell=settings.tell,
            work=work,
            lent=frozenset(resources),
        )
        if isinstance(subject, Program):
            context.tried = lambda passes, after: self._attempt(passes, subject, after, following, work)
            if settings.engines is not None:
                context.lowered = lambda program: self._lowered(program, following)
                context.timed = settings.engines.milliseconds
        return context, bases

    def _attempt(
        self,
        passes: Sequence[Pass],
        subject: Subject,
        after: Trial | None,
        following: Sequence[Rewriter],
        work: Work | None = None,
    ) -> Trial:
        """Passes on a subject or on what another trial made, with rules of their own, which go on from there."""
        told = _Told()
        base = self if after is None else after.run
        assert isinstance(base, _Run), "a trial is what this pass manager made"
        told.calls = list(base.told.calls) if isinstance(base.told, _Told) and after is not None else []
        run = _Run(replace(self.settings, observers=(told,), tell=None), copy(base.rules), told)
        run.work = work if after is None else base.work
        items = [run._own(item) for item in passes]
        done: Subject = subject if after is None else after.program  # type: ignore[assignment]  # of this stage
        for index, item in enumerate(items):
            run.work = None if run.work is None else run.work.tried(recorded_text(item))
            done = run._run_one(item, done, following=[*items[index + 1 :], *following], work=run.work)
        assert isinstance(done, Program)
        return Trial(done, done.history[len(self.rules.history(subject)) :], run)

    def _adopted(self, item: Rewriter, before: Subject, trial: Trial) -> Subject:
        """What a trial made, in the place of the pass that settled for it."""
        run, program = trial.run, trial.program.clone()
        assert isinstance(run, _Run), "a trial is what this pass manager made"
        records = {id(record): replace(record, chosen_by=recorded_text(item)) for record in trial.records}
        program.history = (*self.rules.history(before), *(records[id(record)] for record in trial.records))
        self.rules = run.rules
        for inner, was, now, record, seconds in run.told.calls if run.told is not None else ():
            for observer in self.settings.observers:
                observer.after(inner, was, now, records[id(record)], seconds)
        return program  # type: ignore[return-value]  # only passes of the model stage try others

    def _lowered(self, program: Program, following: Sequence[Rewriter]) -> TrialEngine:
        """The engine of a program after the passes that follow, but for those that train; nothing is checked."""
        assert self.settings.engines is not None
        settings = replace(self.settings, observers=(), tell=None, verify="off")
        rules = copy(self.rules)
        rules.settings = settings
        run = _Run(settings, rules)
        done: Subject = program  # type: ignore[assignment]  # of this stage
        for index, item in enumerate(following):
            if not (isinstance(item, ModelPass) and item.will_train):
                done = run._run_one(item, done, following=following[index + 1 :])
        closed = rules.closed(done)
        assert isinstance(closed, Program)
        return self.settings.engines.build(closed)

    def _rewrite(self, item: Rewriter, subject: Subject, context: Context) -> Subject:
        """What the pass makes of the subject; raises MisplacedError where it edits nothing and that is an error."""
        rules = self.rules
        with working(f"running {item}"):
            try:
                after = rules.rewrite(item, rules.given(subject), context)
                if not isinstance(after, rules.kind):
                    raise PassError(f"it returned a {type(after).__name__}, not a {rules.noun}")
                rules.tidy(after)
            except BmgraphError as error:
                raise type(error)(f"pass {item}: {error}") from error
        if not context.edits and not item.may_match_nothing:
            reasons = "; ".join(f"{edit.site}: {edit.what}" for edit in context.declines[:3])
            raise MisplacedError(
                f"pass {item} changed nothing"
                + (f" ({reasons})" if reasons else f": no site of the {rules.noun} fits it")
            )
        return after

    def _verified(self, change: Change[Subject, Rewriter, Mark], record: Record) -> Record:
        """The record with what was measured."""
        item = change.item
        if self.settings.verify == "off":
            return record
        try:
            return self.rules.check(change, record)
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
                f"pass {item} was stopped: the {self.rules.noun} no longer runs: {first}"
            ) from error
