"""What rows choose in front of their text: how many positions each has there, and where its text is behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import fx

from bmgraph.deltas.family import DeltaFamily, Part, Room
from bmgraph.errors import InputError, MisplacedError, PassError
from bmgraph.ir.node_role import role_of
from bmgraph.ir.program import Program, tensor_nodes
from bmgraph.utils.finite import is_finite

aten = torch.ops.aten

Call = Callable[..., fx.Node]
"""Adds a call at the start of a graph."""


class RowsInFront:
    """The nodes that say of each row what it has in front, for B rows, S positions of text and room for P in front.

    `table` is that of what the deltas use, [deltas + 1, P] of ones and zeros; `choice` i64[B] the input that chooses of it; `source` an
    input with a row for each.
    """

    def __init__(self, call: Call, choice: fx.Node, source: fx.Node, table: fx.Node) -> None:
        self._call, self._source = call, source
        self.used = call(aten.index_select.default, table, 0, choice)
        """Ones and zeros [B, P]."""
        numbers = call(aten.to.dtype, self.used, torch.int64)
        self.counts = call(aten.sum.dim_IntList, numbers, [1], True)
        """How many positions each row has in front, i64[B, 1]."""

    @cached_property
    def rows(self) -> fx.Node:
        """The numbers of the rows, i64[B, 1]."""
        size = self._call(aten.sym_size.int, self._source, 0)
        return self._call(aten.unsqueeze.default, self._call(aten.arange.default, size), 1)


def used_positions(counts: Mapping[int, int], deltas: int, tokens: int, last: bool) -> torch.Tensor:
    """f[deltas + 1, tokens]: ones at the first positions that each delta uses, or at the `last`."""
    used = torch.zeros(deltas + 1, tokens)
    for number, count in counts.items():
        place = slice(tokens - count, None) if last else slice(count)
        used[number, place] = 1
    return used


def room_in_front(counts: Mapping[int, int], names: tuple[str, ...], room: Room) -> int:
    """How many positions tables have room for; raises PassError where a delta needs more."""
    if room.tokens is None:
        return max(counts.values())
    for number, count in counts.items():
        if count > room.tokens:
            raise PassError(
                f"delta {names[number - 1]!r} has {count} positions in front: tokens={room.tokens} must be at least that"
            )
    return room.tokens


def in_type(value: torch.Tensor, dtype: torch.dtype, part: Part) -> torch.Tensor:
    """Numbers in the type of a table; raises PassError for those that it cannot hold."""
    cast = value.to(dtype)
    if not is_finite(cast):
        raise PassError(f"the delta in {part.path} has numbers that {dtype} cannot hold: leave dtype out")
    return cast


def described(counts: Mapping[int, int], names: tuple[str, ...], tokens: int, size: int) -> str:
    """What an edit says of tables."""
    who = ", ".join(f"{names[number - 1]} ({count})" for number, count in counts.items())
    free = names.count("")
    more = f"; {free} more of up to {tokens} have room, {size / 1e6:.2f} MB in all" if free else ""
    return f"positions in front: {who}{more}"


def check_not_of_rows(program: Program, family: DeltaFamily) -> None:
    """Raise InputError where rows choose among deltas of a family: no folder holds several."""
    for node in tensor_nodes(program.graph).values():
        if role_of(node) in family.table_keys:
            raise InputError(
                f"rows of the program choose among deltas of the family {family.name!r}, and a folder holds one: save the whole program"
            )


def entry_in_front(
    value: torch.Tensor, table: torch.Tensor, axis: int, last: bool, part: Part
) -> torch.Tensor:
    """An entry of a table from what a delta has along an axis of positions, at the first positions or the last ones.

    Raises PassError where the table has too few, or other sizes.
    """
    sizes, count = list(table.shape[1:]), int(value.shape[axis])
    if count > sizes[axis]:
        raise PassError(
            f"the delta in {part.path} has {count} positions in front, and the tables have room for {sizes[axis]}: compile with "
            f"Deltas(tokens={count})"
        )
    if [size for index, size in enumerate(value.shape) if index != axis] != sizes[:axis] + sizes[axis + 1 :]:
        raise MisplacedError(
            f"the delta in {part.path} is for another backbone: its values are {list(value.shape)}, and the tables have entries {sizes}"
        )
    found = table.new_zeros(sizes)
    place: list[Any] = [slice(None)] * len(sizes)
    place[axis] = slice(sizes[axis] - count, None) if last else slice(count)
    found[tuple(place)] = in_type(value, table.dtype, part).to(table.device)
    return found
