"""Which input of a program marks padding, and which outputs have positions to ignore where it does."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.program import Program

Batch = Mapping[str, torch.Tensor]


def padding_mask(program: Program, batch: Batch) -> str | None:
    """The name of the input [batch, sequence] whose ones mark real positions; None if there is none, or if the batch holds
    other numbers than zeros and ones in it."""
    for spec in program.inputs:
        value = batch.get(spec.name) if spec.kind is InputKind.MASK else None
        if value is not None and value.dim() == 2 and not value.is_floating_point() and _is_binary(value):
            return spec.name
    return None


def padded_outputs(program: Program, mask: str | None) -> frozenset[str]:
    """The outputs [batch, sequence, ...] whose first two sizes are those of the input `mask`, for all batches.

    Sizes that are only equal in a batch (as many classes as positions) do not count, nor does a fixed length, which cannot
    be told from any other number.
    """
    sizes = next((spec.shape for spec in program.inputs if spec.name == mask), ())
    if len(sizes) != 2 or not isinstance(sizes[1], str) or not (isinstance(sizes[0], str) or sizes[0] == 1):
        return frozenset()
    return frozenset(spec.name for spec in program.outputs if spec.shape[:2] == sizes)


def _is_binary(value: torch.Tensor) -> bool:
    return bool(((value == 0) | (value == 1)).all())
