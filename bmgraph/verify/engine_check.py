"""Compares an engine with the program that it was lowered from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bmgraph.errors import VerificationError
from bmgraph.ir.program import Program
from bmgraph.verify.metrics import drift
from bmgraph.verify.reference_outputs import Batch, Reference, fitted, padded_outputs, padding_mask
from bmgraph.verify.weight_only_check import ROUNDINGS

ENGINE_BOUND = 1e-3
"""Largest relative error (L2) between outputs of engine and program if no activation is rounded."""

ROUNDED_ENGINE_SHARE = 1.5
"""With rounded activations: the bound as a share of the drift since the first program. A last bit that crosses a
rounding step changes all later values by as much as the rounding itself."""


def check_engine(engine: Any, program: Program, batch: Batch, backend: str) -> None:
    """Compare an engine with its program on a batch, and on a resized copy of it; record the drift in the engine's report.

    Raises VerificationError if an output differs by more than the bound.
    """
    reference = Reference.take(program, batch)
    names = {spec.name for spec in engine.inputs}
    kept = {spec.name for spec in engine.outputs}
    expected = replace(
        reference, outputs=[{k: v for k, v in out.items() if k in kept} for out in reference.outputs]
    )
    found = replace(
        reference,
        outputs=[engine(**{k: v for k, v in batch.items() if k in names}) for batch in reference.batches],
    )
    moved = expected.drift_to(found)
    engine.report.engine_drift = moved.error
    cumulative = [record.cumulative for record in program.history if record.cumulative is not None]
    rounded = any(node.target in ROUNDINGS for node in program.graph.nodes)
    bound = ENGINE_BOUND
    if rounded and cumulative:  # the largest: the last pass may have started from a rounded program
        bound = max(ENGINE_BOUND, ROUNDED_ENGINE_SHARE * max(cumulative))
    if not moved.error <= bound:
        raise VerificationError(
            f"the {backend} engine differs from its program in {moved.output} by {moved.error:.1e} (relative), "
            f"more than {bound:.1e}: please report this model"
        )


def measure_total(engine: Any, first: Program, batch: Batch) -> None:
    """Record the drift of an engine from the program before all passes, unless a pass changed the outputs on purpose."""
    if any(record.effect == "intended" for record in engine.report.records):
        return
    names = {spec.name for spec in engine.inputs}
    expected = first(**fitted(batch, first.inputs))
    kept = {spec.name: expected[spec.name] for spec in engine.outputs if spec.name in expected}
    found = engine(**{name: value for name, value in batch.items() if name in names})
    mask = padding_mask(first, batch)
    moved = drift(found, kept, batch[mask] if mask else None, padded_outputs(first, mask))
    engine.report.total_drift, engine.report.total_cosine = moved.error, moved.cosine
