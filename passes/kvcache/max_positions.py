"""How many positions a decoder has: learned tables end somewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import Observed
from bmgraph.analysis.structure.value_origins import stem
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import Range
from bmgraph.passes.kvcache.sequence_roles import Side, Sides

SHORTEST, STEP = 4, 3
"""It is seen which row of a table the last position reads at this length, and at one so much longer."""


def longest(program: Program, sides: Sides) -> int | None:
    """The largest number of positions that every table of the program has a row for; None where nothing bounds it.

    Only a table that is read once for each position, and one row further for every further one, is a bound: biases of
    relative positions are not.
    """
    spec = next(spec for spec in program.inputs if spec.name == sides.tokens.target)
    bounds = program.ranges.get(str(spec.shape[1]), Range())
    length = max(SHORTEST, bounds.low)
    tables = _tables(program, sides)
    found = [bounds.high]
    for name, reads in _reads(program, sides, set(tables), (length, length + STEP)).items():
        if reads[1] - reads[0] == STEP:
            found.append(tables[name] - (reads[0] - (length - 1)))
    return min((item for item in found if item is not None), default=None)


def _tables(program: Program, sides: Sides) -> dict[str, int]:
    """Node of places that rows are looked up by -> the number of rows."""
    found: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or sides.side[node] is not Side.PLACES:
            continue
        by, axis = _looked_up(node)
        if by is not None and sides.side[by] is Side.PLACES and len(sides.axes(by)) == 1:
            table = node.args[0]
            if isinstance(table, fx.Node) and sides.side[table] is Side.OTHER:
                found[by.name] = int(table.meta["val"].shape[axis])
    return found


def _looked_up(node: fx.Node) -> tuple[fx.Node | None, int]:
    """What says the rows that a call looks up, and the axis of the table."""
    name, args = stem(node), node.args
    by: Any = None
    axis: Any = 0
    if name == "embedding":
        by = args[1]
    elif name == "index" and isinstance(args[1], (list, tuple)) and len(args[1]) == 1:
        by = args[1][0]
    elif name in ("gather", "index_select"):
        by, axis = args[2], args[1]
    return (by if isinstance(by, fx.Node) else None), int(axis)


def _reads(program: Program, sides: Sides, names: set[str], lengths: tuple[int, int]) -> dict[str, list[int]]:
    """The last row that is read at each length."""
    reads: dict[str, list[int]] = {name: [] for name in names}
    if not names or program.device.type == "meta":
        return {}
    observed = Observed(program)

    def visit(name: str, value: torch.Tensor) -> None:
        reads[name].append(int(value.max()))

    for length in lengths:
        observed.run(_unpadded(program.example, sides, length), names, visit)
    return reads


def _unpadded(example: Mapping[str, torch.Tensor], sides: Sides, length: int) -> dict[str, torch.Tensor]:
    batch = dict(example)
    along = {str(node.target) for node in (sides.tokens, *sides.rows, *sides.masks)}
    masks = {str(node.target) for node in sides.masks}
    for name in along:
        value = example[name][:, :1].expand(-1, length).contiguous()
        batch[name] = torch.ones_like(value) if name in masks else value
    return batch
