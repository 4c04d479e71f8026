"""The batches on which a captured program is compared with its model, besides the example: other sizes, other values."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from bmgraph.frontend.dynamic_dims import sizes_that_break_guards
from bmgraph.ir.input_kind import MASKS, InputKind
from bmgraph.ir.program import Program, placeholders
from bmgraph.verify.reference_outputs import other_batch

Choices = list[dict[str, torch.Tensor]]
"""Batches, the first of which that a model takes is compared."""


def proof_batches(program: Program) -> list[Choices]:
    """Batches of other sizes and values, made from the example: for each the choices, the strictest first.

    The first choice also moves values within each input by another step, so that no two inputs that were equal by
    accident stay equal. A model may refuse that (boxes whose corners must be in order), but not the second choice,
    unless the sizes themselves are wrong for it.
    """
    kept = MASKS | {InputKind.ATTENTION_BIAS}
    masks = {spec.name for spec in program.inputs if spec.kind in kept}
    inputs = {name: node.meta["val"] for name, node in placeholders(program.graph).items()}
    chosen: list[Mapping[str, int]] = [{}, *sizes_that_break_guards(inputs, program.symbols, program.ranges)]
    found: list[Choices] = []
    for wanted in chosen:
        resized = other_batch(program, program.example, wanted)
        if resized is not None:
            found.append([_moved(resized, masks), resized])
        elif not wanted:
            found.append([_moved(_first_row_twice(program.example), masks)])
    return found


def _first_row_twice(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy of a batch without its last row: moving values alone keeps sums."""
    return {
        name: torch.cat([value[:1], value[:-1]]) if value.dim() else value for name, value in batch.items()
    }


def _moved(batch: Mapping[str, torch.Tensor], masks: Collection[str]) -> dict[str, torch.Tensor]:
    """A copy of a batch with the values of the n-th input moved by n + 1 rows and columns; masks stay as they are."""
    moved = {}
    for step, (name, value) in enumerate(batch.items(), 1):
        axes = [0, -1] if value.dim() > 1 else [0] * value.dim()
        moved[name] = value.clone() if name in masks or not axes else value.roll([step] * len(axes), axes)
    return moved
