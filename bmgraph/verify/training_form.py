"""Compares the training forms of a program before and after a pass, both without dropout: outputs, buffers, gradients."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from bmgraph.errors import VerificationError
from bmgraph.ir.eval_form import zero_dropout
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of
from bmgraph.verify.gradients import GradientMap, differences, output_gradients
from bmgraph.verify.metrics import relative_error
from bmgraph.verify.reference_outputs import Reference, exact_bounds, fitted

GRADIENT_TOLERANCE = 1e-3
"""Largest error of a gradient, relative to its norm (L2)."""


def check_training_form(before: Program, after: Program, reference: Reference) -> None:
    """Raise VerificationError where the training forms differ by more than rounding, without dropout.

    Only programs whose two forms differ in more than dropout are run: those with statistics of a batch.
    """
    if before.training or after.training or not (_forms_differ(before) or _forms_differ(after)):
        return
    bounds = exact_bounds(before)
    for batch in reference.batches:
        expected, found = (_run(program, batch) for program in (before, after))
        for name, value in expected.items():
            if name not in found:
                continue
            error = (
                relative_error(found[name], value)
                if value.is_floating_point()
                else float(not torch.equal(found[name], value))
            )
            bound = bounds.get(name, max(bounds.values(), default=1e-5))
            if not error <= bound:
                raise VerificationError(
                    f"in training {name} moved by {error:.1e} (relative), more than rounding ({bound:.0e}); dropout was off"
                )


def check_gradients(
    before: Program,
    after: Program,
    batch: Mapping[str, torch.Tensor],
    factors: Mapping[str, torch.Tensor] = MappingProxyType({}),
    maps: Mapping[str, GradientMap] = MappingProxyType({}),
) -> None:
    """Raise VerificationError where a parameter that trains in both programs has another gradient, without dropout.

    `factors`: what parameters were multiplied by; their gradients must be the former ones, divided by these. `maps`: how the gradients
    of other parameters follow from the former ones; those that do not are left out.
    """
    if before.training or after.training:
        return
    shared = [
        name
        for name, tensor in before.parameters.items()
        if name in after.parameters
        and tensor.shape == after.parameters[name].shape
        and tensor.is_floating_point()
        and name not in before.frozen
        and name not in after.frozen
    ]
    if not shared:
        return
    expected, found = (
        output_gradients(program, fitted(batch, program.inputs), shared) for program in (before, after)
    )
    for name in expected.keys() & factors.keys():
        expected[name] = expected[name] / factors[name].to(expected[name])
    known = dict(expected)
    for name in expected.keys() & maps.keys():
        mapped = maps[name](known)
        if mapped is None:
            shared.remove(name)
        else:
            expected[name] = mapped
    wrong = differences(found, expected, shared, GRADIENT_TOLERANCE, {})
    if wrong:
        worst = max(wrong, key=lambda name: wrong[name])
        raise VerificationError(
            f"the gradients of {len(wrong)} of {len(shared)} parameters changed, most of {worst!r} (by {wrong[worst]:.2g} of "
            "its norm)"
        )


def _forms_differ(program: Program) -> bool:
    """Whether the training form computes something else than the eval form, apart from dropout."""
    rows = map(traits_of, program.graph.nodes)
    return bool(program.writes) or any(row.train and row.kind is not Kind.DROPOUT for row in rows)


def _run(program: Program, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs of the training form without dropout, and all buffers after it."""
    copy = program.clone()
    zero_dropout(copy.graph)
    copy.buffers = {name: buffer.clone() for name, buffer in program.buffers.items()}
    values = fitted(batch, program.inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        outputs = copy.module(training=True)(*(values[spec.name] for spec in program.inputs))
    found = dict(zip((spec.name for spec in program.outputs), outputs))
    return {**found, **{f"buffer {name!r}": copy.buffers[name] for name in copy.buffers}}
