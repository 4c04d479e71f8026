"""Checks that graphs which were split compute what the one graph computed that passes ran on."""

from __future__ import annotations

from collections.abc import Sequence

from bmgraph.errors import VerificationError
from bmgraph.ir.joined_graphs import Part
from bmgraph.ir.omitted_inputs import inputs_of
from bmgraph.ir.program import Program
from bmgraph.verify.reference_outputs import Reference, exact_bounds, fitted


def check_parts(divided: Program, joined: Program, parts: Sequence[Part], reference: Reference) -> None:
    """Raise VerificationError where a graph gives other outputs than `joined` did: those of `reference`, on its batches.

    What graphs hand to each other is compared in what is made of it.
    """
    bounds = exact_bounds(joined)
    handed = {name for part in parts for name in part.fed}
    for part in parts:
        entry = divided.at(part.name)
        specs = zip(part.outputs, part.signature.outputs)
        own = {name: spec.name for name, spec in specs if spec.name not in handed}
        outputs = [
            {name: found[spec] for name, spec in own.items()}
            for found in (entry(**fitted(batch, inputs_of([entry]))) for batch in reference.batches)
        ]
        found = Reference(reference.batches, outputs, reference.measured, reference.mask, reference.padded)
        wanted = Reference(
            reference.batches,
            [{name: values[name] for name in own} for values in reference.outputs],
            reference.measured, reference.mask, reference.padded,
        )  # fmt: skip
        moved = wanted.beyond(found, bounds)
        if moved:
            raise VerificationError(
                f"graph {part.name!r} by itself computes something else than with the others: {moved}"
            )
