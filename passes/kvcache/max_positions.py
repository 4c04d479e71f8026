"""Finds the largest number of positions that a decoder supports, from its learned position tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import Observed
from bmgraph.analysis.structure.value_origins import stem
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import Range
from bmgraph.passes.kvcache.sequence_roles import SequenceRole, SequenceRoles

MIN_LENGTH, STEP = 4, 3
"""Table reads are compared at this length and at one longer by STEP."""


def max_positions(program: Program, roles: SequenceRoles) -> int | None:
    """The largest number of positions for which every position table of the program has a row; None if unbounded.

    A table is a bound only if each further position reads one row further: tables of relative position biases are not.
    """
    spec = next(spec for spec in program.inputs if spec.name == roles.tokens.target)
    bounds = program.ranges.get(str(spec.shape[1]), Range())
    length = max(MIN_LENGTH, bounds.low)
    tables = _tables(program, roles)
    limits = [bounds.high]
    for name, last_rows in _last_rows_read(program, roles, set(tables), (length, length + STEP)).items():
        if last_rows[1] - last_rows[0] == STEP:
            limits.append(tables[name] - (last_rows[0] - (length - 1)))
    return min((item for item in limits if item is not None), default=None)


def _tables(program: Program, roles: SequenceRoles) -> dict[str, int]:
    """Name of the node with the row numbers of a lookup -> the number of rows of its table."""
    table_sizes: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or roles.role[node] is not SequenceRole.POSITIONS:
            continue
        rows, axis = _lookup(node)
        if (
            rows is not None
            and roles.role[rows] is SequenceRole.POSITIONS
            and len(roles.sequence_axes(rows)) == 1
        ):
            table = node.args[0]
            if isinstance(table, fx.Node) and roles.role[table] is SequenceRole.OTHER:
                table_sizes[rows.name] = int(table.meta["val"].shape[axis])
    return table_sizes


def _lookup(node: fx.Node) -> tuple[fx.Node | None, int]:
    """The node with the row numbers of a lookup (None if the call is not a lookup), and the axis of the table."""
    name, args = stem(node), node.args
    rows: Any = None
    axis: Any = 0
    if name == "embedding":
        rows = args[1]
    elif name == "index" and isinstance(args[1], (list, tuple)) and len(args[1]) == 1:
        rows = args[1][0]
    elif name in ("gather", "index_select"):
        rows, axis = args[2], args[1]
    return (rows if isinstance(rows, fx.Node) else None), int(axis)


def _last_rows_read(
    program: Program, roles: SequenceRoles, names: set[str], lengths: tuple[int, int]
) -> dict[str, list[int]]:
    """For each name, the last row that is read at each length."""
    last_rows: dict[str, list[int]] = {name: [] for name in names}
    if not names or program.device.type == "meta":
        return {}
    observed = Observed(program)

    def visit(name: str, value: torch.Tensor) -> None:
        last_rows[name].append(int(value.max()))

    for length in lengths:
        observed.run(_unpadded_example(program.example, roles, length), names, visit)
    return last_rows


def _unpadded_example(
    example: Mapping[str, torch.Tensor], roles: SequenceRoles, length: int
) -> dict[str, torch.Tensor]:
    """The example with sequences of this length and without padding."""
    batch = dict(example)
    sequence_inputs = {str(node.target) for node in (roles.tokens, *roles.position_inputs, *roles.masks)}
    masks = {str(node.target) for node in roles.masks}
    for name in sequence_inputs:
        value = example[name][:, :1].expand(-1, length).contiguous()
        batch[name] = torch.ones_like(value) if name in masks else value
    return batch
