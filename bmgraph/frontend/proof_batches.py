"""The batches on which a captured program is compared with its model, besides the example: other sizes, other values."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from bmgraph.frontend.dynamic_dims import guards_hold, sizes_that_break_guards
from bmgraph.ir.input_kind import MASKS, InputKind
from bmgraph.ir.program import Program, placeholders
from bmgraph.ir.symbolic_dim import is_name
from bmgraph.ir.tensor_spec import row_sizes
from bmgraph.utils.collecting import is_large
from bmgraph.verify.reference_outputs import other_batch

Choices = list[dict[str, torch.Tensor]]
"""Batches, the first of which that a model takes is compared."""

FEW_ROWS, SHORT, SHORTER = 3, 19, 7
"""Numbers of rows, and other sizes, of the batch that is compared besides a larger example; SHORTER for a large model, whose
time is that of its products."""


def proof_batches(program: Program) -> list[Choices]:
    """Batches of other sizes and values, made from the example: for each the choices, the strictest first.

    They are small where every guard of the trace holds at small sizes and the model takes them: the time of a comparison is
    that of its values, and all that tells sizes apart is a guard (`sizes_that_break_guards`). The first choice also moves
    values within each input by another step, so that no two inputs that were equal by accident stay equal. A model may
    refuse that (boxes whose corners must be in order), but not the second choice, unless the sizes themselves are wrong for
    it.
    """
    kept = MASKS | {InputKind.ATTENTION_BIAS}
    masks = {spec.name for spec in program.inputs if spec.kind in kept}
    inputs = {name: node.meta["val"] for name, node in placeholders(program.graph).items()}
    chosen: list[Mapping[str, int]] = [{}, *sizes_that_break_guards(inputs, program.symbols, program.ranges)]
    small = _small_sizes(program)
    if not guards_hold(inputs, program.symbols, {**_example_sizes(program), **small}):
        small = {}
    found: list[Choices] = []
    for wanted in chosen:
        choices: Choices = []
        for sizes in (small, {}) if small and not wanted else (wanted,):
            resized = other_batch(program, program.example, sizes)
            if resized is not None:
                choices += [_moved(resized, masks), resized]
        if choices:
            found.append(choices)
        elif not wanted:
            found.append([_moved(_first_row_twice(program.example), masks)])
    return found


def _small_sizes(program: Program) -> dict[str, int]:
    """A small number for each dynamic size of which the example has more, within its range."""
    rows = row_sizes(program.inputs)
    short = SHORTER if is_large(program.parameters.values()) else SHORT
    small: dict[str, int] = {}
    for dim, size in _example_sizes(program).items():
        few = FEW_ROWS if dim in rows else short
        bounds = program.ranges.get(dim)
        if few < size and (bounds is None or bounds.low <= few):
            small[dim] = few
    return small


def _example_sizes(program: Program) -> dict[str, int]:
    """The dynamic sizes of the example, by name."""
    return {
        str(dim): program.example[spec.name].shape[axis]
        for spec in program.inputs
        for axis, dim in enumerate(spec.shape)
        if is_name(dim)
    }


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
