"""What the pass manager asks of a stage: how what passes rewrite is copied, tidied, measured and compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from bmgraph.errors import DriftError
from bmgraph.ir.pass_record import Cost, Record
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.pass_manager.run_settings import RunSettings
from bmgraph.training.step_program import StepProgram

Subject = TypeVar("Subject", bound=Program | StepProgram)
"""What passes of a stage rewrite."""
Rewriter = TypeVar("Rewriter", bound=Pass)
"""The passes of a stage."""
Mark = TypeVar("Mark")
"""What a stage remembers of a subject, to compare what comes after with it."""


@dataclass(frozen=True)
class Change(Generic[Subject, Rewriter, Mark]):
    """One run of a pass: the subject before and after it, and what its checks need.

    `base` is the subject after the last pass that this one ran as a part of itself (else `before`); `start` and `base_mark`
    are what the stage remembers of `before` and `base`.
    """

    item: Rewriter
    before: Subject
    start: Mark
    base: Subject
    base_mark: Mark
    after: Subject
    context: Context


class StageRules(ABC, Generic[Subject, Rewriter, Mark]):
    """One stage in one run of passes; keeps the outputs that passes are compared with."""

    noun: ClassVar[str]
    """What passes of the stage rewrite, in messages."""
    kind: type[Subject]
    item_kind: type[Rewriter]

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings

    @abstractmethod
    def history(self, subject: Subject) -> tuple[Record, ...]:
        """The records of the passes that made a subject what it is."""

    @abstractmethod
    def keep(self, subject: Subject, record: Record) -> None:
        """Add a record to the history of a subject."""

    @abstractmethod
    def prepared(self, subject: Subject) -> Subject:
        """What the run begins with, checked."""

    def opened(self, subject: Subject) -> Subject:
        """The subject as passes see it: the first begins with it."""
        return subject

    def closed(self, subject: Subject) -> Subject:
        """What the run ends with, of what the last pass made."""
        return subject

    @abstractmethod
    def before(self, subject: Subject) -> Subject:
        """The subject as it is now, which a pass that gets `given(subject)` leaves as it is."""

    @abstractmethod
    def given(self, subject: Subject) -> Subject:
        """What a pass may change."""

    @abstractmethod
    def rewrite(self, item: Rewriter, subject: Subject, context: Context) -> object:
        """What a pass makes of a subject."""

    @abstractmethod
    def fits(self, item: Rewriter, subject: Subject, context: Context) -> bool:
        """Whether a pass says that it was made for a subject."""

    @abstractmethod
    def tidy(self, subject: Subject) -> None:
        """Put what a pass made in order."""

    @abstractmethod
    def cost(self, subject: Subject) -> Cost:
        """The size of a subject."""

    @abstractmethod
    def added_inputs(self, before: Subject, after: Subject) -> tuple[str, ...]:
        """The inputs that a pass added."""

    @abstractmethod
    def compares(self, subject: Subject) -> bool:
        """Whether outputs are compared."""

    @abstractmethod
    def mark(self, subject: Subject) -> Mark:
        """What is remembered of a subject before a pass."""

    @abstractmethod
    def check(self, change: Change[Subject, Rewriter, Mark], record: Record) -> Record:
        """The record with what was measured. Raises an error for what the pass may not have done."""

    def check_drift(self, own: float, moved: float, total: float, what: str, where: str) -> None:
        """Raise DriftError where an approximate pass, with a bound of its `own`, moved something too far."""
        wanted = self.settings.max_drift
        bound = own if wanted is None else wanted
        since = [
            (moved, "by this pass"),
            *([] if wanted is None else [(total, f"since the first {self.noun}")]),
        ]
        for error, when in since:
            if not error <= bound:
                raise DriftError(
                    f"the {what} drifted by {error:.3f} {when}, more than {bound:g} (max_drift); worst in {where}"
                )
