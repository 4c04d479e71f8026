"""LoadDelta: attach a delta that was saved to disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bmgraph.analysis.structure.sites import Linear
from bmgraph.deltas.changed_weights import with_changed_weights
from bmgraph.deltas.low_rank import NewDelta, attach_all, check_backbone_frozen, free_stem
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.adapter_matching import (
    adapter_changes,
    check_backbone,
    is_backbone_of,
    load_adapter,
    match_adapter,
    set_whole,
)
from bmgraph.verify.proof import Proof


@dataclass(frozen=True, repr=False)
class LoadDelta(ModelPass):
    """Attach a delta that `save_delta` or PEFT wrote: `LoadDelta("trec")` with `resources={"trec": "trec/"}`.

    The delta stays trainable and everything else is frozen. Modules that were trained whole beside it (PEFT's
    `modules_to_save`) get their values, and train on. The backbone may have been quantized or pruned since the
    delta was saved. Raises ResourceError where the folder is not given, BundleError where it was altered or is not an
    adapter, PassError where the fingerprint, a module or a shape belongs to another backbone.
    """

    effect: ClassVar[Effect] = "intended"
    changes: ClassVar[frozenset[str]] = frozenset({"frozen"})
    provides: ClassVar[frozenset[str]] = frozenset({"delta"})

    delta: str = "delta"

    @property
    def resources(self) -> tuple[str, ...]:
        """The adapter folder."""
        return (self.delta,)

    def fits(self, program: Program, context: Context) -> bool:
        """Whether the adapter was trained on the program."""
        return is_backbone_of(program, [load_adapter(context, self.delta)])

    def run(self, program: Program, context: Context) -> Program:
        """Add the adapter's A and B to every use of its modules."""
        adapter = load_adapter(context, self.delta)
        check_backbone(program, adapter)
        set_whole(program, adapter, context)
        linears = match_adapter(program, adapter)
        added: list[tuple[Linear, NewDelta]] = []
        stems: set[str] = set()
        for module, linear in linears.items():
            change = adapter.changes[module]
            stem = free_stem(program, linear.name, taken=stems)
            stems.add(stem)
            delta = NewDelta(linear.name, stem, change.a, change.b, change.scale, dropout=adapter.dropout)
            added.append((linear, delta))
            context.edited(linear.name, f"rank {change.a.shape[0]} of {self.delta!r} ({module})")
        attach_all(program, added, by=str(self))
        return program

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """The linears must multiply by W + scale * B A of the adapter, beside the tensors that it holds whole."""
        check_backbone_frozen(after)
        adapter = load_adapter(context, self.delta)
        expected = before.clone()
        set_whole(expected, adapter, Context(context.resources))
        changes = adapter_changes(expected, adapter)
        proof.same(
            with_changed_weights(expected, changes), after, f"it does not compute {self.delta!r}", slack=10
        )
