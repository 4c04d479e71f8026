"""LoadDelta: a saved delta beside the weights of its backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bmgraph.analysis.structure.sites import Linear
from bmgraph.deltas.low_rank import NewDelta, attach_all, free_stem
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, Pass
from bmgraph.passes.adapter_matching import fit, given_adapter


@dataclass(frozen=True, repr=False)
class LoadDelta(Pass):
    """Put a delta that `save_delta` or PEFT wrote on its backbone, `LoadDelta("trec")` with
    `resources={"trec": "trec/"}`; it trains on, all else is frozen.

    The backbone may have been quantised or pruned since. Raises ResourceError without the folder, BundleError for one
    that is altered or no adapter, PassError where the fingerprint, a module or a shape is another backbone's.
    """

    effect: ClassVar[Effect] = "intended"
    provides: ClassVar[frozenset[str]] = frozenset({"delta"})

    delta: str = "delta"

    @property
    def resources(self) -> tuple[str, ...]:
        """The folder of the adapter."""
        return (self.delta,)

    def run(self, program: Program, context: Context) -> Program:
        """Add the adapter's factors to every use of its modules."""
        adapter = given_adapter(context, self.delta)
        linears = fit(program, adapter)
        added: list[tuple[Linear, NewDelta]] = []
        for module, linear in linears.items():
            change = adapter.changes[module]
            stem = free_stem(program, linear.name)
            delta = NewDelta(linear.name, stem, change.a, change.b, change.scale, dropout=adapter.dropout)
            added.append((linear, delta))
            context.edited(linear.name, f"rank {change.a.shape[0]} of {self.delta!r} ({module})")
        attach_all(program, added, by=str(self))
        return program
