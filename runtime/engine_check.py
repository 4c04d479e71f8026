"""Compares an engine with the program that it was lowered from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from bmgraph.errors import DriftError, VerificationError
from bmgraph.ir.cache_spec import CacheLayout
from bmgraph.ir.joined_graphs import join
from bmgraph.ir.omitted_inputs import inputs_of
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of
from bmgraph.runtime.engine_base import Engine
from bmgraph.verify.equal_values import ordered_equals
from bmgraph.verify.metrics import drift
from bmgraph.verify.padding import padded_outputs, padding_mask
from bmgraph.verify.reference_outputs import EXACT, Batch, Reference, comparison_batch, exact_bounds, fitted
from bmgraph.verify.rounded_cache import with_rounded_cache
from bmgraph.verify.weight_only_check import unrounded

ENGINE_BOUND = 1e-3
"""Largest relative error (L2) between outputs of engine and program if no activation is rounded."""

BOUNDS = {torch.float32: ENGINE_BOUND, torch.bfloat16: 3e-2}
"""The same by what the engine computes float32 in."""

ROUNDED_ENGINE_SHARE = 1.5
"""With rounded activations: the bound as a share of the drift since the first program. A last bit that crosses a
rounding step changes all later values by as much as the rounding itself."""

CACHE_DRIFT = 0.1
"""Largest relative change (L2) of logits by a KV cache of 8 bits if nobody says."""

TIES = (
    "are equal or closer than rounding, and which of them comes first is not defined: break ties in the model, such as by adding "
    'a small multiple of the position, or, where any order will do, compile with verify="structure"'
)
"""Said of values that a program puts in order."""


def check_engine(
    engine: Engine, program: Program, batch: Batch, backend: str, max_drift: float | None = None
) -> None:
    """Compare an engine with its program on a batch, on a resized copy of it and on a probe; record the drift on the first
    two in the engine's report.

    An engine that keeps its KV cache in 8 bits is compared with the program whose cache is rounded so, and that with the program itself,
    whose logits it may move by `max_drift`, by default CACHE_DRIFT.
    Raises VerificationError if an output differs by more than the bound, DriftError if a cache of 8 bits moves the logits by more.
    """
    fits = program.clone()
    fits.ranges = {**program.ranges, **engine.ranges}
    names = {spec.name for spec in engine.inputs}
    reference = Reference.take(fits, batch).where(
        lambda batch: engine.has_room_for({name: value for name, value in batch.items() if name in names})
    )
    kept = {spec.name for spec in engine.outputs}
    expected = replace(
        reference, outputs=[{k: v for k, v in out.items() if k in kept} for out in reference.outputs]
    )
    found = replace(
        reference,
        outputs=[engine(**{k: v for k, v in batch.items() if k in names}) for batch in reference.batches],
    )
    expected, found = _without_hidden(expected, program.cache), _without_hidden(found, program.cache)
    engine.report.engine_drift = expected.drift_to(found).error
    bounds = _bounds(
        program, expected, max(BOUNDS[engine.precision], _halves(program), _apart(program, expected, found))
    )
    if engine.rounds_cache:
        exact, expected = expected, _without_hidden(_with_rounded_cache(expected, fits), program.cache)
        _check_cache_drift(engine, exact, expected, CACHE_DRIFT if max_drift is None else max_drift)
        moved_by_cache = (max(moved.values(), default=0.0) for moved in exact.errors_to(expected))
        bounds = [max(bound, ROUNDED_ENGINE_SHARE * moved) for bound, moved in zip(bounds, moved_by_cache)]
    for moved, bound, checked in zip(expected.errors_to(found), bounds, reference.batches):
        output = max(moved, key=moved.__getitem__, default="")
        if output and not moved[output] <= bound:
            shape = "x".join(map(str, next(iter(checked.values())).shape))
            equal = ordered_equals(program, checked)
            coarse = engine.precision is not torch.float32
            advice = (
                "let the engine compute in float32 (precision='f32')"
                if coarse
                else "please report this model"
            )
            raise VerificationError(
                f"the {backend} engine differs from its program in {output} by {moved[output]:.1e} (relative) on a "
                f"batch of {shape}, more than {bound:.1e}: {f'{equal} {TIES}' if equal else advice}"
            )


def _without_hidden(reference: Reference, cache: CacheLayout | None) -> Reference:
    """The reference with zeros for what a cache holds of positions that the mask hides: nobody reads them, and where a query sees no key
    at all, as in padding that is longer than a model's window, each kernel gives something else."""
    if cache is None or cache.mask is None:
        return reference
    pairs = zip(reference.batches, reference.outputs)
    return replace(
        reference, outputs=[_shown(cache, batch.get(cache.mask), outputs) for batch, outputs in pairs]
    )


def _shown(
    cache: CacheLayout, mask: torch.Tensor | None, outputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Outputs with zeros at the positions of slots that a mask [B, T] hides."""
    if mask is None:
        return dict(outputs)
    found, hidden = dict(outputs), mask == 0
    for slot in cache.slots if bool(hidden.any()) else ():
        value = found.get(slot.present)
        if value is not None and (value.shape[0], value.shape[slot.axis]) == tuple(hidden.shape):
            sizes = [size if axis in (0, slot.axis) else 1 for axis, size in enumerate(value.shape)]
            found[slot.present] = value.masked_fill(hidden.to(value.device).reshape(sizes), 0)
    return found


def _with_rounded_cache(reference: Reference, program: Program) -> Reference:
    """The reference with what the program gives whose KV cache is rounded to 8 bits."""
    kept = reference.outputs[0].keys()
    outputs = [with_rounded_cache(program, fitted(batch, program.inputs)) for batch in reference.batches]
    return replace(reference, outputs=[{name: found[name] for name in kept} for found in outputs])


def _check_cache_drift(engine: Engine, exact: Reference, rounded: Reference, bound: float) -> None:
    """Say in the report how far a cache of 8 bits moves the logits; raise DriftError where it is by more than a bound."""
    assert engine.cache is not None
    logits, slot = engine.cache.logits, engine.cache.slots[0]
    read = [
        (moved[logits], batch[slot.past].shape[slot.axis])
        for moved, batch in zip(exact.errors_to(rounded), exact.batches[: exact.measured])
        if slot.past in batch and batch[slot.past].shape[slot.axis] and logits in moved
    ]
    if not read:
        engine.report.notes.append(
            "no batch has a cache that is read: how far 8 bits move the logits is not known"
        )
        return
    moved, length = max(read)
    if not moved <= bound:
        raise DriftError(
            f"a KV cache in 8 bits moves the logits by {moved:.3f} (relative L2) behind {length} cached positions, more than {bound:.3g}: "
            "leave kv_cache out, or set max_drift if that is acceptable"
        )
    engine.report.notes.append(
        f"a KV cache in 8 bits moves the logits by {moved:.2%} (relative L2) behind {length} cached positions"
    )


def _halves(program: Program) -> float:
    """What outputs may differ by where the program computes in float16, whose kernels sum in another order than torch's; 0 where it does
    not."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    computes = any(isinstance(value, torch.Tensor) and value.dtype is torch.float16 for value in values)
    return EXACT[torch.float16] if computes else 0.0


def _apart(program: Program, expected: Reference, found: Reference) -> float:
    """What outputs in the program's types may differ by on two devices, both of which round; 0 on one."""
    here, there = (
        {value.device for outputs in one.outputs for value in outputs.values()} for one in (expected, found)
    )
    return 0.0 if there <= here else 2 * max(exact_bounds(program).values(), default=0.0)


def _bounds(program: Program, expected: Reference, least: float) -> list[float]:
    """The bound for each batch, `least` or more where activations are rounded, by as much as the rounding changes there."""
    cumulative = [record.cumulative for record in program.history if record.cumulative is not None]
    if not any(traits_of(node).kind is Kind.ROUNDING for node in program.graph.nodes):
        return [least] * len(expected.batches)
    # the largest: the last pass may have started from a rounded program
    known = ROUNDED_ENGINE_SHARE * max(cumulative, default=0.0)
    if not cumulative:
        return [least] * len(expected.batches)
    probe = replace(
        expected, batches=expected.batches[expected.measured :], outputs=expected.outputs[expected.measured :]
    )
    probes = [max(moved.values(), default=0.0) for moved in probe.errors_to(probe.rerun(unrounded(program)))]
    return [
        *[max(least, known)] * expected.measured,
        *[max(least, known, ROUNDED_ENGINE_SHARE * error) for error in probes],
    ]


def measure_total(engine: Engine, first: Program, batch: Batch, calibration: object) -> None:
    """Record the drift of an engine from the program before all passes, unless a pass changed the outputs on purpose.

    Both run with the graphs that feed them, on what these take: the first of `calibration`, or the example, instead of the
    `batch`.
    """
    if any(record.effect == "intended" for record in engine.report.records):
        return
    if first.feeders():
        batch = comparison_batch(join(first)[0], calibration)
    names = {spec.name for spec in inputs_of([engine])}
    expected = first(**fitted(batch, inputs_of([first])))
    kept = {spec.name: expected[spec.name] for spec in engine.outputs if spec.name in expected}
    found = engine(**{name: value for name, value in batch.items() if name in names})
    mask = padding_mask(first, batch)
    moved = drift(found, kept, batch[mask] if mask else None, padded_outputs(first, mask))
    engine.report.total_drift, engine.report.total_cosine = moved.error, moved.cosine
