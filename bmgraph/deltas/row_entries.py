"""What a loaded delta writes into one entry of the tables of which rows choose; refuses what the tables have no place for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bmgraph.analysis.site_filter import nearest
from bmgraph.deltas.backbone_match import check_trained_on
from bmgraph.deltas.family import Part
from bmgraph.deltas.linear_family import LinearFamily
from bmgraph.deltas.peft_format import Adapter
from bmgraph.deltas.row_stacks import corner
from bmgraph.deltas.row_tables import RowTable, RowTables
from bmgraph.errors import MisplacedError, PassError
from bmgraph.utils.digest import digest
from bmgraph.utils.finite import is_finite

Entry = Mapping[str, torch.Tensor]
"""Name of a table -> the beginning of an entry; what is not there changes nothing."""


def entry_of(form: RowTables, adapter: Adapter, tensors: Mapping[str, torch.Tensor]) -> Entry:
    """The entry that makes rows compute with an adapter; `tensors` are the tables.

    Raises MisplacedError for an adapter of another backbone or module, PassError for one of another family, rank or option than
    the tables have.
    """
    check_trained_on(adapter, form.backbone, form.computation)
    by_place = {(item.family, module, item.key): item for item in form.tables for module in item.modules}
    entry: dict[str, torch.Tensor] = {}
    for part in adapter.parts:
        if part.family.takes_positions:
            if not part.empty:
                _check_family(form, part)
                entry |= part.family.entries_in_front(part, form.tables, tensors)
            continue
        if not isinstance(part.family, LinearFamily):
            _check_nothing(part)
            continue
        _check_options(form, part, part.family)
        for module in part.changes:
            entry |= _of_module(by_place, part, part.family, module, tensors)
    return entry


def write_entry(tensors: Mapping[str, torch.Tensor], number: int, entry: Entry) -> None:
    """Write an entry of all tables; where it is smaller, it is filled up with what changes nothing."""
    with torch.no_grad():
        for name, table in tensors.items():
            value = entry.get(name)
            if value is None or value.shape != table.shape[1:]:
                table[number].copy_(table[0])
            if value is not None:
                table[corner(number, value.shape)].copy_(value)


def _check_nothing(part: Part) -> None:
    changed = [*part.family.contents(part)]
    if changed:
        raise PassError(
            f"the delta in {part.path} changes {', '.join(map(str, changed[:3]))} whole (modules_to_save), which a row cannot "
            "choose: load it alone with LoadDelta"
        )


def _check_family(form: RowTables, part: Part) -> None:
    """Raise PassError for a family without a table."""
    there = sorted({item.family for item in form.tables})
    if part.family.name not in there:
        raise PassError(
            f"the delta in {part.path} is of the family {part.family.name!r}, and the tables hold {', '.join(there)}: name one of that "
            "family in Deltas, so that it makes room"
        )


def _check_options(form: RowTables, part: Part, family: LinearFamily) -> None:
    """Raise PassError for a family without a table, and for options and shared tensors that are not those of the table."""
    _check_family(form, part)
    for key in family.alike:
        wanted = form.alike.get(f"{family.name}.{key}")
        if key in part.options and str(part.options[key]) != wanted:
            raise PassError(
                f"the delta in {part.path} has {key}={part.options[key]!r}, and those that rows choose have {wanted!r}"
            )
        own = {
            id(value): value
            for change in part.changes.values()
            if (value := change.tensors.get(key)) is not None
        }
        if any(digest(value) != wanted for value in own.values()):
            raise PassError(
                f"the delta in {part.path} has another matrix {key!r} than those that rows choose, which share it: it must be made "
                "with the same random matrices"
            )


def _of_module(
    by_place: Mapping[tuple[str, str, str], RowTable],
    part: Part,
    family: LinearFamily,
    module: str,
    tensors: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The entries for one module, by table."""
    found = {}
    for key, value in family.row_entry(part.changes[module]).items():
        table = by_place.get((family.name, module, key))
        if table is None:
            near = nearest(module, sorted({name for kind, name, _ in by_place if kind == family.name}))
            hint = f" (near it: {', '.join(near)})" if near else ""
            raise MisplacedError(
                f"the delta in {part.path} changes {module!r} ({key}), for which the tables have no place{hint}: name a delta "
                "that changes it in Deltas, before passes that replace its linear"
            )
        room, axis = tensors[table.name].shape[1:], family.rank_axes.get(key, 0) - 1
        size = value.shape
        if len(size) == len(room) and axis >= 0 and size[axis] > room[axis]:
            raise PassError(
                f"the delta in {part.path} has rank {size[axis]} at {module}, and the tables have room for {room[axis]}: compile "
                f"with Deltas(rank={size[axis]})"
            )
        if len(size) != len(room) or any(
            mine != own for index, (mine, own) in enumerate(zip(size, room)) if index != axis
        ):
            raise MisplacedError(
                f"the delta in {part.path} is for another backbone, or a pass behind Deltas (SplitOutliers, Shrink) has changed the "
                f"linear: its {key} of {module} is {list(size)}, and the tables have {list(room)}"
            )
        found[table.name] = _held_by(tensors[table.name], value, part, module)
    return found


def _held_by(table: torch.Tensor, value: torch.Tensor, part: Part, module: str) -> torch.Tensor:
    """An entry in the type of its table; raises PassError for numbers that this cannot hold."""
    if value.dtype == table.dtype:
        return value
    cast = value.to(table.dtype)
    if not is_finite(cast):
        raise PassError(
            f"the delta in {part.path} has numbers at {module} that {table.dtype} cannot hold, the type of the tables"
        )
    return cast
