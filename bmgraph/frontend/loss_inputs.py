"""Inputs that only a loss reads have the sizes of those that the loss compares them with, which no call of the model says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bmgraph.ir.program import Program


def share_sizes(program: Program, alike: Mapping[str, str]) -> None:
    """Let inputs of a program have the sizes of others, in place, axis by axis: `alike` names the other of each, or "" for none.

    An axis whose sizes differ in the example keeps its own.
    """
    specs = {spec.name: spec for spec in program.inputs}
    for name, other in alike.items():
        if name not in specs or other not in specs:
            continue
        sizes = program.example[name].shape, program.example[other].shape
        for mine, theirs, own, found in zip(specs[name].shape, specs[other].shape, *sizes):
            if mine != theirs and own == found and isinstance(mine, str) and isinstance(theirs, str):
                _rename(program, mine, theirs)
                specs = {spec.name: spec for spec in program.inputs}


def _rename(program: Program, size: str, other: str) -> None:
    """Let one dynamic size be another one."""
    program.symbols = {symbol: other if name == size else name for symbol, name in program.symbols.items()}
    program.inputs = tuple(
        replace(spec, shape=tuple(other if dim == size else dim for dim in spec.shape))
        for spec in program.inputs
    )
    program.ranges = {name: bounds for name, bounds in program.ranges.items() if name != size}
