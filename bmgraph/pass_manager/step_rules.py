"""The step stage: training steps, compared by their loss and whole gradients on the beginning of the example, by all ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.cost_model import cost_of
from bmgraph.ir.pass_record import Cost, Record
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import StepPass
from bmgraph.pass_manager.run_settings import RunSettings
from bmgraph.pass_manager.stage_rules import Change, StageRules
from bmgraph.training.step_program import StepProgram
from bmgraph.utils.graph_copies import copy_nodes
from bmgraph.verify.step_check import StepReference, check_random, check_step

StepChange = Change[StepProgram, StepPass, StepReference | None]


class StepRules(StageRules[StepProgram, StepPass, StepReference | None]):
    """Passes on training steps: each takes the step's tensors, so that sharding them frees the whole ones."""

    noun: ClassVar[str] = "step"
    kind = StepProgram
    item_kind = StepPass  # type: ignore[type-abstract]

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self._first: StepReference | None = None
        self._last: StepReference | None = None

    def history(self, subject: StepProgram) -> tuple[Record, ...]:
        """The program's records, then the step's own."""
        return (*subject.outline.history, *subject.history)

    def keep(self, subject: StepProgram, record: Record) -> None:
        """Add a record to the step's history."""
        subject.history = (*subject.history, record)

    def prepared(self, subject: StepProgram) -> StepProgram:
        """The step itself."""
        return subject

    def before(self, subject: StepProgram) -> StepProgram:
        """The step without its values: its graph, and its tensors on the meta device."""
        copy = replace(subject, graph=fx.Graph())
        copy.graph.output(copy_nodes(copy.graph, subject.graph, {}))
        copy.tensors = {
            name: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            for name, tensor in subject.tensors.items()
        }
        return copy

    def given(self, subject: StepProgram) -> StepProgram:
        """The step itself."""
        return subject

    def rewrite(self, item: StepPass, subject: StepProgram, context: Context) -> object:
        """What a pass makes of a step."""
        return item.run(subject, context)

    def fits(self, item: StepPass, subject: StepProgram, context: Context) -> bool:
        """Whether a pass says that it was made for a step."""
        return item.fits(subject, context)

    def tidy(self, subject: StepProgram) -> None:
        """Nothing: dead code may be collective, and a pass removes its own."""
        return

    def cost(self, subject: StepProgram) -> Cost:
        """Parameters and bytes on this rank, and floating-point operations of a whole step."""
        held = [
            tensor
            for name, tensor in subject.tensors.items()
            if name in subject.places  # one without a place is stopped by the check that follows
            and all(part in subject.outline.parameters for part in subject.places[name].names)
        ]
        return cost_of(held, [subject.graph], subject.outline)

    def added_inputs(self, before: StepProgram, after: StepProgram) -> tuple[str, ...]:
        """None: a step takes what its program takes."""
        return ()

    def compares(self, subject: StepProgram) -> bool:
        """Whether loss and gradients are compared, as far as the step's size allows."""
        return self.settings.verify == "numeric"

    def mark(self, subject: StepProgram) -> StepReference | None:
        """What the step computes on the example, as it was before the last pass or is before the first."""
        if self._last is None and self.compares(subject):
            self._first = self._last = StepReference.take(subject, subject.outline.example)
        return self._last

    def check(self, change: StepChange, record: Record) -> Record:
        """Legality, then loss and gradients. Collective, and what fails on one rank is an error on all."""
        item, after, start = change.item, change.after, change.start
        with after.ranks.fail_together():
            check_step(after)
            if item.promises == "exact":
                check_random(change.before, after)
        if start is None or self._first is None:
            return record
        now = start.rerun(after)
        if now.skipped:
            return replace(record, compared=f"structure alone: {now.skipped}")
        if item.promises == "intended":
            self._first = self._last = now.with_updates_of(after)
            return replace(record, compared="taken anew")
        moved = start.distances_to(now, after.ranks)
        since = moved if start is self._first else self._first.distances_to(now, after.ranks)
        with after.ranks.fail_together():
            if item.promises == "exact":
                start.check_same(now, moved)
            error, where = start.drift_to(now, moved)
            total = error if start is self._first else self._first.drift_to(now, since)[0]
            if item.promises == "approximate":
                self.check_drift(item.allowed_drift, error, total, "loss and gradients", where)
        if item.promises == "exact":
            start.check_updates(after)  # what is exact leaves the reference as it is
        else:
            self._last = now.with_updates_of(after)
        return replace(record, drift=error, cumulative=total, compared=now.describe())
