"""Runs passes of either stage in order, with the chores around each: verification, drift, cost, history, observers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, overload

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
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.model_rules import ModelRules
from bmgraph.pass_manager.ordering import check_order, holds, offer
from bmgraph.pass_manager.pass_base import Pass, StepPass
from bmgraph.pass_manager.pass_spec import recorded_text
from bmgraph.pass_manager.run_settings import RunSettings
from bmgraph.pass_manager.stage_rules import Change, Mark, Rewriter, StageRules, Subject
from bmgraph.pass_manager.step_rules import StepRules
from bmgraph.training.step_program import StepProgram
from bmgraph.utils.progress import working


@dataclass(frozen=True)
class PassManager(RunSettings):
    """Runs passes with these settings: those of the model stage on a program, those of the step stage on its step."""

    @overload
    def run(self, passes: Sequence[Pass], subject: Program) -> Program: ...

    @overload
    def run(self, passes: Sequence[Pass], subject: StepProgram) -> StepProgram: ...

    def run(self, passes: Sequence[Pass], subject: Program | StepProgram) -> Program | StepProgram:
        """The program, or the step, after all passes. A given program is left as it was; a given step is not to be used
        again, since passes take its tensors.

        Raises OrderError before anything runs where the contracts forbid the order, and where a pass finds that it has
        to run first; VerificationError or DriftError naming the pass that broke its contract; PassError and
        ResourceError where a pass cannot run.
        """
        if isinstance(subject, Program):
            return _Run(self, ModelRules(self)).run(passes, subject)
        return _Run(self, StepRules(self)).run(passes, subject)


def provided(history: Sequence[Record]) -> set[str]:
    """What the passes in a history provide."""
    return {name for record in history for name in record.provides}


class _Run(Generic[Subject, Rewriter, Mark]):
    """One run of passes of one stage."""

    def __init__(self, settings: RunSettings, rules: StageRules[Subject, Rewriter, Mark]) -> None:
        self.settings, self.rules = settings, rules

    def run(self, passes: Sequence[Pass], subject: Subject) -> Subject:
        """The subject after all passes."""
        has = provided(self.rules.history(subject))
        check_order(passes, has=has, resources=self.settings.resources)
        items = [self._own(item) for item in passes]
        subject = self.rules.prepared(subject)
        if not items:
            return subject
        subject = self.rules.opened(subject)
        first = self.rules.before(subject)
        for index, item in enumerate(items):
            try:
                subject = self._run_one(item, subject, following=items[index + 1 :])
            except MisplacedError as error:
                reordered = (item, *items[:index], *items[index + 1 :])
                if index == 0 or not holds(reordered, has) or not self._fits(item, first):
                    raise
                raise OrderError(f"{error}; {offer(reordered)}") from error
        return self.rules.closed(subject)

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
    ) -> Subject:
        """Run one pass with all chores around it; `within` is the text of the pass that runs it as a part of itself,
        `following` are the passes after it, `resources` those that it has beside the given ones."""
        begin = time.perf_counter()
        rules, settings = self.rules, self.settings
        start = rules.mark(subject)
        before = rules.before(subject)
        context = Context(
            {**settings.resources, **resources},
            settings.target,
            trainer=settings.trainer,
            proves=rules.compares(subject),
            following=[one for one in following if isinstance(one, StepPass)],
        )
        bases = [(before, start)]

        def run_nested(inner: Pass, given: object, more: Mapping[str, object]) -> Subject:
            if not isinstance(given, rules.kind):
                raise PassError(f"it runs {inner} on a {type(given).__name__}, not on a {rules.noun}")
            done = self._run_one(self._own(inner), given, within=recorded_text(item), resources=more)
            bases.append((rules.before(done), rules.mark(done)))
            return rules.given(done)

        context.nested = run_nested
        for name in item.resources:
            if not context.has(name):
                context.resource(name)
        cost = rules.cost(before)
        after = self._rewrite(item, subject, context)
        record = Record(
            text=recorded_text(context.settled or item), effect=item.promises, stage=item.acts_on, edits=tuple(context.edits), declined=tuple(context.declines),
            before=cost, after=rules.cost(after), provides=tuple(sorted(item.provides)), resources=dict(context.digests),
            inputs=rules.added_inputs(before, after), within=within, target=settings.target.text, machine=machine(),
        )  # fmt: skip
        base, base_mark = bases[-1]
        record = self._verified(Change(item, before, start, base, base_mark, after, context), record)
        rules.keep(after, record)
        for observer in settings.observers:
            observer.after(item, before, after, record, time.perf_counter() - begin)
        return after

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
