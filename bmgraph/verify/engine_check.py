"""An engine held against the program that it was lowered from, before anybody is given it."""

from __future__ import annotations

from typing import Any

from bmgraph.errors import VerificationError
from bmgraph.ir.program import Program
from bmgraph.verify.metrics import drift
from bmgraph.verify.reference_outputs import Batch, Reference, padding_mask
from bmgraph.verify.weight_only_check import ROUNDINGS

ENGINE_BOUND = 1e-3
"""How far an engine's outputs may be from its program's (relative L2) when no activation in it is rounded."""

ROUNDED_ENGINE_SHARE = 1.5
"""The same, as a share of the drift since a first program, when activations are rounded: a last bit that falls on the
other side of a rounding step moves everything after it by as much as the rounding itself did."""


def check_engine(engine: Any, program: Program, batch: Batch, backend: str) -> None:
    """Hold the engine against its program on a batch, and on one of other sizes made of it."""
    reference = Reference.take(program, batch)
    names = {spec.name for spec in engine.inputs}
    kept = {spec.name for spec in engine.outputs}
    expected = Reference(
        reference.batches, [{k: v for k, v in out.items() if k in kept} for out in reference.outputs]
    )
    found = Reference(
        reference.batches,
        [engine(**{k: v for k, v in batch.items() if k in names}) for batch in reference.batches],
    )
    moved = expected.drift_to(found)
    engine.report.engine_drift = moved.error
    cumulative = [record.cumulative for record in program.history if record.cumulative is not None]
    rounded = any(node.target in ROUNDINGS for node in program.graph.nodes)
    bound = ENGINE_BOUND
    if (
        rounded and cumulative
    ):  # the last pass may have begun with what was rounded already: the largest counts
        bound = max(ENGINE_BOUND, ROUNDED_ENGINE_SHARE * max(cumulative))
    if not moved.error <= bound:
        raise VerificationError(
            f"the {backend} engine differs from its program in {moved.output} by {moved.error:.1e} (relative), "
            f"more than {bound:.1e}: please report this model"
        )


def measure_total(engine: Any, first: Program, batch: Batch) -> None:
    """The drift of the engine from the program that the passes began with, where its outputs mean the same."""
    if any(record.effect == "intended" for record in engine.report.records):
        return
    names = {spec.name for spec in engine.inputs}
    expected = first(**{spec.name: batch[spec.name] for spec in first.inputs})
    kept = {spec.name: expected[spec.name] for spec in engine.outputs if spec.name in expected}
    found = engine(**{name: value for name, value in batch.items() if name in names})
    moved = drift(found, kept, padding_mask(batch))
    engine.report.total_drift, engine.report.total_cosine = moved.error, moved.cosine
