"""Finds the largest number of positions that a decoder supports, from its learned position tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import Observed
from bmgraph.analysis.value_ranges import value_ranges
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import Range
from bmgraph.ops.index_bounds import checked_indices
from bmgraph.ops.trait_row import Lookup
from bmgraph.ops.traits import traits_of
from bmgraph.passes.kvcache.sequence_roles import SequenceRole, SequenceRoles

MIN_LENGTH, STEP = 4, 3
"""Table reads are compared at this length and at one longer by STEP."""


def max_positions(program: Program, roles: SequenceRoles) -> int | None:
    """The largest number of positions for which every position table of the program has a row; None if unbounded.

    A table is a bound only if each further position reads one row further: tables of relative position biases are not.
    A table that an input of position numbers is looked up in is one too, and so is a length at which the program itself
    finds no row.
    """
    spec = next(spec for spec in program.inputs if spec.name == roles.tokens.target)
    bounds = program.ranges.get(str(spec.shape[1]), Range())
    limits = [bounds.high, *_limits_of_inputs(program, roles)]
    tables = _tables(program, roles)
    if tables and program.device.type != "meta":
        limits += _limits_of_tables(program, roles, tables, bounds)
    return min((item for item in limits if item is not None), default=None)


def _limits_of_tables(
    program: Program, roles: SequenceRoles, tables: Mapping[str, int], bounds: Range
) -> list[int | None]:
    """The limits of the tables that the program itself numbers its positions for."""
    short = max(MIN_LENGTH, bounds.low)
    long = short + STEP
    if bounds.high is not None and bounds.high < long:
        return [_longest_that_runs(program, roles, range(bounds.low, bounds.high + 1))]
    first, second = (_last_rows_read(program, roles, set(tables), size) for size in (short, long))
    if first is None or second is None:
        return [_longest_that_runs(program, roles, range(bounds.low, long))]
    return [
        rows - (first[name] - (short - 1))
        for name, rows in tables.items()
        if second[name] - first[name] == STEP
    ]


def _limits_of_inputs(program: Program, roles: SequenceRoles) -> list[int]:
    """The rows of the tables that inputs of position numbers, which begin at 0, are looked up in."""
    known = value_ranges(program.graph)
    highest = [known[name][1] for node in roles.position_inputs if (name := str(node.target)) in known]
    return [high + 1 for high in highest if high is not None]


def _longest_that_runs(program: Program, roles: SequenceRoles, lengths: range) -> int | None:
    """The largest of some lengths at which every lookup of the program finds its row; None if there is none."""
    return next(
        (size for size in reversed(lengths) if _last_rows_read(program, roles, set(), size) is not None), None
    )


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
    lookup, args = traits_of(node).lookup, node.args
    rows: Any = None
    axis: Any = 0
    if lookup is Lookup.ROWS:
        rows = args[1]
    elif lookup is Lookup.LIST and isinstance(args[1], (list, tuple)) and len(args[1]) == 1:
        rows = args[1][0]
    elif lookup is Lookup.AXIS:
        rows, axis = args[2], args[1]
    return (rows if isinstance(rows, fx.Node) else None), int(axis)


def _last_rows_read(
    program: Program, roles: SequenceRoles, names: set[str], length: int
) -> dict[str, int] | None:
    """For each name, the last row that is read at a length; None if a lookup of the program finds no row."""
    last_rows: dict[str, int] = {}

    def visit(name: str, value: torch.Tensor) -> None:
        last_rows[name] = int(value.max())

    try:
        with checked_indices(program.device):
            Observed(program).run(_unpadded_example(program.example, roles, length), names, visit)
    except (IndexError, RuntimeError):  # what eager raises where an index is out of range
        return None
    return last_rows


def _unpadded_example(
    example: Mapping[str, torch.Tensor], roles: SequenceRoles, length: int
) -> dict[str, torch.Tensor]:
    """The example with sequences of this length and without padding."""
    batch = dict(example)
    sequence_inputs = {str(node.target) for node in (roles.tokens, *roles.position_inputs, *roles.masks)}
    masks = {str(node.target) for node in roles.masks}
    positions = {str(node.target) for node in roles.position_inputs}
    for name in sequence_inputs:
        value = example[name][:, :1].expand(-1, length).contiguous()
        if name in positions:
            value = torch.arange(length, device=value.device).expand_as(value).to(value.dtype)
        batch[name] = torch.ones_like(value) if name in masks else value
    return batch
