"""Tables of deltas in the program of a torch engine, which owns them and writes into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from bmgraph.deltas.row_tables import RowTables
from bmgraph.errors import BundleError
from bmgraph.ir.program import Program
from bmgraph.runtime.live_deltas import LiveDeltas


def with_own_tables(program: Program, form: RowTables) -> Program:
    """A copy whose tables share no memory with those of other programs."""
    own = program.clone()
    for item in form.tables:
        own.parameters[item.name] = program.parameters[item.name].detach().clone()
    return own


def compacted(program: Program, live: LiveDeltas) -> Program:
    """A copy with the deltas that are there now as the entries 1, 2, ..., and room behind them, as a program has them.

    Raises BundleError where there are none: an input without a name to give would be no choice.
    """
    slots = live.slots
    taken = [number for number, name in enumerate(slots, 1) if name]
    if not taken:
        raise BundleError(
            "all deltas were removed from the engine, and a program whose rows choose among none cannot be saved: add one"
        )
    order = torch.tensor([0, *taken, *[0] * (len(slots) - len(taken))])
    names = tuple(slots[number - 1] for number in taken)
    copy = program.clone()
    for name, table in live.tensors.items():
        copy.parameters[name] = table[order.to(table.device)]
    for entry in copy.entries():
        entry.inputs = tuple(
            replace(spec, names=names) if spec.name == live.form.input else spec for spec in entry.inputs
        )
        if live.form.input in entry.example:
            entry.example[live.form.input] = entry.example[live.form.input] % (len(names) + 1)
    return copy


def narrowed(form: RowTables | None, values: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Inputs with one choice in the place of equal ones, where that may stand for all rows: it is then gathered once."""
    chosen = values.get(form.input) if form is not None and form.broadcasts else None
    if form is None or chosen is None or len(chosen) < 2 or not bool((chosen == chosen[0]).all()):
        return values
    return {**values, form.input: chosen[:1]}
