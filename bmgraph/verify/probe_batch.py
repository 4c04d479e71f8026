"""The probe batch: many rows, long, padded anywhere, ids over whole tables. It shows what a small example hides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from bmgraph.analysis.cost_model import cost
from bmgraph.ir.matching import plain_size
from bmgraph.ir.program import Program
from bmgraph.ir.symbolic_dim import is_name, size_of
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.verify.padding import padding_mask

ROWS = 9
"""Number of rows: more than fit a vector of 8, and one for each way of padding."""

LONGEST = 48
"""The size of other dynamic axes, where their range and the budget allow it."""

SHORTEST = 8
"""Below this, the budget does not shorten an axis further."""

MOST_OFFSET = 2
"""How many rows of a table of positions are in front of the first position, at most."""

BUDGET = 1e11
"""Floating-point operations that one run on the probe may take, about a second of a processor core."""

MOST_VALUES = 2**24
"""Values that the largest output may have: the logits of many words are kept for several programs."""

LARGE = 1e4
"""Inputs with values at least this large, such as additive masks, are repeated, not mixed."""


def probe_batches(program: Program, batch: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Choices of a probe batch made from a batch, the strictest first.

    Every second choice keeps the values of integer inputs, among which a model may demand an order. Empty if all sizes are
    fixed, or cannot be derived.
    """
    choices = []
    for longest in (LONGEST, *_table_lengths(program), LONGEST // 2, LONGEST // 4):
        sizes = _sizes(program, batch, longest)
        if sizes is not None:
            choices += _at_sizes(program, batch, sizes)
    return choices


def _table_lengths(program: Program) -> list[int]:
    """Lengths that tables of positions may allow, the longest first: ranges do not tell of all tables."""
    tables: list[Any] = [
        node.args[0] for node in program.graph.nodes if node.target is torch.ops.aten.embedding.default
    ]
    sizes = {plain_size(table.meta["val"].shape[0]) for table in tables}
    lengths = {size - offset for size in sizes if isinstance(size, int) for offset in (0, MOST_OFFSET)}
    return sorted((length for length in lengths if SHORTEST < length < LONGEST), reverse=True)


def _at_sizes(
    program: Program, batch: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    mask = padding_mask(program, batch)
    kept, spread = {}, {}
    for spec in program.inputs:
        value = _repeated(spec, batch[spec.name], sizes)
        if spec.name == mask:
            value = _padded(value)
        kept[spec.name] = value
        spread[spec.name] = value if spec.name == mask else _spread(spec, value, generator)
    return [spread, kept]


def _sizes(program: Program, batch: Mapping[str, torch.Tensor], longest: int) -> dict[str, int] | None:
    """The size of each dynamic axis, by its name or expression; None if there is none or one cannot be derived."""
    given, measured = _given(program, batch), _given(program, program.example)
    flops = cost(program).flops
    rows = {
        spec.shape[0]
        for spec in program.inputs
        if spec.shape and isinstance(spec.shape[0], str) and is_name(spec.shape[0])
    }
    sizes = {
        name: _within(program, name, ROWS if name in rows else longest)
        for name, size in given.items()
        if is_name(name)
    }
    if not sizes:
        return None
    long = [name for name in sizes if name not in rows]
    while _growth(sizes, measured) * flops > BUDGET or _values(program, sizes) > MOST_VALUES:
        halved = {
            name: max(_within(program, name, sizes[name] // 2), min(SHORTEST, given[name])) for name in long
        }
        if all(halved[name] >= sizes[name] for name in long):
            break
        sizes |= halved
    for dim in given.keys() - sizes.keys():
        size = size_of(dim, sizes)
        if size is None:
            return None
        sizes[dim] = size
    return sizes


def _given(program: Program, batch: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The size of each dynamic axis in a batch."""
    return {
        dim: batch[spec.name].shape[axis]
        for spec in program.inputs
        for axis, dim in enumerate(spec.shape)
        if isinstance(dim, str)
    }


def _within(program: Program, name: str, size: int) -> int:
    """The size nearest to a wanted one in the range of a dynamic axis."""
    bounds = program.ranges.get(name)
    if bounds is None:
        return size
    return max(bounds.low, size if bounds.high is None else min(size, bounds.high))


def _growth(sizes: Mapping[str, int], given: Mapping[str, int]) -> float:
    """How many times as many elements as at the given sizes a value has that runs over all dynamic axes."""
    growth = 1.0
    for name, size in sizes.items():
        growth *= size / max(given[name], 1)
    return growth


def _values(program: Program, sizes: Mapping[str, int]) -> int:
    """The number of values of the largest output at given sizes."""
    shapes = [[size_of(dim, sizes) or 1 for dim in spec.shape] for spec in program.outputs]
    return max((math.prod(shape) for shape in shapes), default=0)


def _repeated(spec: TensorSpec, value: torch.Tensor, sizes: Mapping[str, int]) -> torch.Tensor:
    """The value with its rows and columns repeated up to new sizes."""
    for axis, dim in enumerate(spec.shape):
        if isinstance(dim, str):
            index = torch.arange(sizes[dim], device=value.device) % max(value.shape[axis], 1)
            value = value.index_select(axis, index)
    return value


def _padded(mask: torch.Tensor) -> torch.Tensor:
    """A mask [rows, length] of the same dtype: the first row is not padded, the others in turn in front, with holes, behind, in
    front and with holes. The last position is real in all rows but those padded behind."""
    rows, length = mask.shape
    row = torch.arange(rows, device=mask.device)[:, None]
    position = torch.arange(length, device=mask.device)[None]
    kind, third = torch.where(row == 0, 0, 1 + (row - 1) % 4), max(1, length // 3)
    front = position >= third - row // 4
    holes = (position + row) % 4 != 0
    behind = position < length - third
    real = torch.ones(rows, length, dtype=torch.bool, device=mask.device)
    for number, pattern in ((1, front), (2, holes), (3, behind), (4, front & holes)):
        real = torch.where(kind == number, pattern.expand(rows, length), real)
    real[:, -1] |= ~real.any(1) | (kind[:, 0] != 3)
    if length == 1:
        real[:] = True
    return real.to(mask.dtype)


def _spread(spec: TensorSpec, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Other values of the same input: integers over their whole range, floating-point values in another order."""
    count = value.numel()
    order = torch.randperm(count, generator=generator).to(value.device)
    if spec.names:
        return (
            (torch.arange(count, device=value.device) % (len(spec.names) + 1))
            .reshape(value.shape)
            .to(value.dtype)
        )
    low, high = spec.values or (0, None)
    if high is not None:
        places = torch.arange(count, device=value.device)
        span = high - low + 1
        # Both ends are among them; all values, if there are no more than elements.
        found = places % span if span <= count else places * (span - 1) // max(count - 1, 1)
        return (low + found)[order].reshape(value.shape).to(value.dtype)
    if value.is_floating_point() and bool((value.abs() < LARGE).all()):
        return value.flatten()[order].reshape(value.shape)
    return value
