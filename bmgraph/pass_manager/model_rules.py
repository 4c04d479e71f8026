"""The model stage: programs, compared by their outputs on batches, and bit by bit in what a pass did not name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from bmgraph.analysis.cost_model import cost
from bmgraph.analysis.input_kinds import known_kinds
from bmgraph.analysis.value_ranges import with_value_ranges
from bmgraph.errors import InputError, ResourceError, VerificationError
from bmgraph.ir.editor import remove_dead
from bmgraph.ir.joined_graphs import Part, join
from bmgraph.ir.pass_record import Cost, Record
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import dims, fixed_sizes, propagate
from bmgraph.ir.shared_weights import check_unchanged
from bmgraph.ir.split_graphs import split, with_new_outputs
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.ir.verifier import check_program
from bmgraph.pass_manager.context import CALIBRATION, Context
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.pass_manager.run_settings import RunSettings
from bmgraph.pass_manager.stage_rules import Change, StageRules
from bmgraph.verify.changed_rows import batch_of_changed_rows
from bmgraph.verify.graph_parts import check_parts
from bmgraph.verify.proof import Proof
from bmgraph.verify.reference_outputs import (
    Batch,
    Reference,
    comparison_batch,
    exact_bounds,
    fitted,
)
from bmgraph.verify.training_form import check_gradients, check_training_form
from bmgraph.verify.unnamed_changes import Snapshot, check_unnamed
from bmgraph.verify.weight_only_check import check_sites, check_weight_only


@dataclass(frozen=True)
class ProgramMark:
    """What is remembered of a program: its tensors and names, and its outputs where they are compared."""

    snapshot: Snapshot
    outputs: Reference | None


ModelChange = Change[Program, ModelPass, ProgramMark]


class ModelRules(StageRules[Program, ModelPass, ProgramMark]):
    """Passes on programs: each gets a clone."""

    noun: ClassVar[str] = "program"
    kind = Program
    item_kind = ModelPass  # type: ignore[type-abstract]

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self._first: Reference | None = None
        """Outputs of the first program: cumulative drift is measured from them."""
        self._last: Reference | None = None
        """Outputs after the last pass: the drift of the next one is measured from them."""
        self._parts: tuple[Part, ...] = ()
        """The graphs of the program, which passes see as one."""
        self._anew = False
        """Whether an intended pass has set a new first reference."""

    def history(self, subject: Program) -> tuple[Record, ...]:
        """The program's own."""
        return subject.history

    def keep(self, subject: Program, record: Record) -> None:
        """Add a record to the program's history."""
        subject.history = (*subject.history, record)

    def prepared(self, subject: Program) -> Program:
        """The program with the kinds of its inputs known. Raises InputError where the model's weights were changed."""
        check_unchanged(subject.parameters, subject.shared)
        return known_kinds(subject)

    def opened(self, subject: Program) -> Program:
        """The program as one graph, so that passes and checks see all of its graphs."""
        joined, self._parts = join(subject)
        return joined

    def closed(self, subject: Program) -> Program:
        """The program with its graphs, unless a pass divided it itself. Raises VerificationError where it cannot be divided."""
        if not self._parts or len(subject.graphs) > 1:
            return subject
        parts = with_new_outputs(subject, self._parts)
        divided = split(subject, parts)
        if self.settings.verify != "off":
            check_program(divided)
        if self._last is not None and self.compares(subject):
            check_parts(divided, subject, parts, self._last.without_probe())
        return divided

    def before(self, subject: Program) -> Program:
        """The program itself."""
        return subject

    def given(self, subject: Program) -> Program:
        """A clone, which shares all tensors."""
        return subject.clone()

    def rewrite(self, item: ModelPass, subject: Program, context: Context) -> object:
        """What a pass makes of a program."""
        return item.run(subject, context)

    def fits(self, item: ModelPass, subject: Program, context: Context) -> bool:
        """Whether a pass says that it was made for a program."""
        return item.fits(subject, context)

    def tidy(self, subject: Program) -> None:
        """Infer shapes, remove dead code, and let the specs say what the graph takes and returns."""
        propagate(subject)
        remove_dead(subject)
        for entry in subject.entries():
            entry.inputs = with_value_ranges(entry)
            values: Any = output_node(entry.graph).args[0]
            entry.outputs = tuple(
                TensorSpec(spec.name, node.meta["val"].dtype, dims(entry, node.meta["val"]))
                for spec, node in zip(entry.outputs, values)
            )

    def cost(self, subject: Program) -> Cost:
        """Parameters, bytes and floating-point operations."""
        return cost(subject)

    def added_inputs(self, before: Program, after: Program) -> tuple[str, ...]:
        """The inputs by name that only the program after a pass has."""
        known = {spec.name for spec in before.inputs}
        return tuple(spec.name for spec in after.inputs if spec.name not in known)

    def compares(self, subject: Program) -> bool:
        """Whether outputs are compared: there must be an example, and weights that fit in memory."""
        return (
            self.settings.verify == "numeric"
            and subject.device.type != "meta"
            and bool(subject.example)
            and subject.fits_in_memory
        )

    def mark(self, subject: Program) -> ProgramMark:
        """The program's tensors and names, and the outputs of the last pass, or of this program as the first."""
        if self._last is None and self.compares(subject):
            self._last = self._taken(subject)
            self._first = self._last.without_probe()
        return ProgramMark(Snapshot.of(subject), self._last)

    def packed(self) -> dict[str, Any] | None:
        """What the next pass is compared with, as plain values, for `restore`; None where nothing is compared."""
        if self._last is None or self._first is None:
            return None
        last, first = self._last, self._first
        return {
            "batches": [dict(batch) for batch in last.batches],
            "first": [dict(batch) for batch in first.batches],
            "outputs": first.outputs if self._anew else None,  # else those of the first program
            "measured": last.measured,
            "mask": last.mask,
            "padded": sorted(last.padded),
        }

    def restore(self, first: Program, program: Program, packed: Mapping[str, Any] | None) -> None:
        """Go on after the passes that made a program of the first one: it is compared with what it gives."""
        if packed is None:
            return
        own = packed["measured"], packed["mask"], frozenset(packed["padded"])
        last = Reference(packed["batches"], [_outputs(program, batch) for batch in packed["batches"]], *own)
        outputs = packed["outputs"]
        if outputs is None:
            outputs = [_outputs(first, batch) for batch in packed["first"]]
        self._first, self._last = Reference(packed["first"], outputs, *own), last
        self._anew = packed["outputs"] is not None

    def check(self, change: ModelChange, record: Record) -> Record:
        """Legality, what the pass did not name, then outputs."""
        item, after = change.item, change.after
        check_program(after)
        _check_free_sizes(change.before, after, item.promises)
        if item.promises != "intended":
            _check_output_names(change.before, after)
        check_unnamed(change.base, after, record.edits, item.declared, change.base_mark.snapshot)
        if self.settings.verify == "numeric" and not change.before.fits_in_memory:
            return replace(record, compared=check_sites(change.base, after, str(item), item.measured))
        start, base = change.start.outputs, change.base_mark.outputs
        if start is None or base is None or self._first is None or not self.compares(after):
            return record
        if item.promises == "intended":
            item.prove(change.base, after, Proof(base), change.context)
            self._last = self._taken(after)
            self._first = self._last.without_probe()
            self._anew = True
            return replace(record, compared="taken anew")
        now = start.rerun(after)
        moved, total = start.drift_to(now), self._first.drift_to(now)
        if item.promises == "exact":
            self._check_exact(change, start, now)
        else:
            self.check_drift(item.allowed_drift, moved.error, total.error, "outputs", moved.output)
            if item.measured is not None:
                check_weight_only(change.base, after, str(item), base, item.measured)
        item.prove(change.base, after, Proof(base), change.context)
        self._last = now
        return replace(
            record, drift=moved.error, cumulative=total.error, cosine=total.cosine,
            compared=now.describe(probe=item.promises == "exact"),
        )  # fmt: skip

    def _check_exact(self, change: ModelChange, start: Reference, now: Reference) -> None:
        beyond = start.beyond(now, exact_bounds(change.before))
        if beyond:
            raise VerificationError(f"it is declared exact, but {beyond}")
        rare = batch_of_changed_rows(change.before, change.after, start.batches[0])
        if rare is not None:
            Proof(replace(start, batches=[rare], outputs=[])).same(
                change.before, change.after, "it is declared exact"
            )
        check_training_form(change.before, change.after, start)
        if self.settings.trains:
            told = change.context
            check_gradients(change.before, change.after, start.batches[0], told.factors, told.gradients)

    def _taken(self, program: Program) -> Reference:
        """The outputs of a program on the first calibration batch where there is one, since activations are scaled for such data.

        Raises ResourceError where that batch does not fit the program.
        """
        batch = comparison_batch(program, self.settings.resources.get(CALIBRATION))
        try:
            return Reference.take(program, batch)
        except InputError as error:
            if batch is program.example:
                raise
            raise ResourceError(f"calibration batch 0 does not fit the program: {error}") from error


def _outputs(program: Program, batch: Batch) -> dict[str, torch.Tensor]:
    return program(**fitted(batch, program.inputs))


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
