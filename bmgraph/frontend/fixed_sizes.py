"""Tell at capture, not at run time, which sizes a program has fixed although its model takes others."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from bmgraph.frontend.own_run import own_run
from bmgraph.frontend.square_example import REFUSED
from bmgraph.ir.program import Program, placeholders

FIXED_AT = "fixed_at"
"""Metadata key of an input: by axis, the line that fixed its size."""

Axis = tuple[str, int]
"""(input, axis)"""

_SOURCE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")


def fixing_lines(exported: torch.export.ExportedProgram) -> dict[Axis, str]:
    """The lines, as `file.py:line`, that compared the size of an axis with a number while the model was traced."""
    values = [node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"]
    modes = [value.fake_mode for value in values if hasattr(value, "fake_mode")]
    environment: Any = modes[0].shape_env if modes else None
    if environment is None:
        return {}
    axes: dict[Any, Axis] = {}
    for symbol, sources in environment.var_to_sources.items():
        for source in sources:
            name = source.name if isinstance(source.name, str) else source.name()
            found = _SOURCE.fullmatch(name)
            if found:
                axes[symbol] = found[1], int(found[2])
    lines: dict[Axis, str] = {}
    for guard in environment.guards:
        symbols = guard.expr.free_symbols & axes.keys()
        frame = guard.sloc.framework_loc
        decides = guard.expr.is_Relational and not _is_bound(guard.expr)
        if decides and len(symbols) == 1 and hasattr(frame, "lineno"):
            lines.setdefault(axes[next(iter(symbols))], f"{frame.filename}:{frame.lineno}")
    return {axis: line for axis, line in lines.items() if "/torch/" not in line}


def warn_of_fixed_sizes(program: Program, model: nn.Module, stacklevel: int) -> None:
    """Write into `program.narrower`, and warn of, the sizes that are fixed although the model takes a smaller one.

    A size that the model itself fixes, by the shape of a weight, is none of them. Leaves the model as it was.
    """
    if not program.fixed or program.device.type == "meta":
        return
    nodes = placeholders(program.graph)
    lines = []
    for group in _fixed_groups(program):
        size = program.example[group[0][0]].shape[group[0][1]]
        if not _takes_smaller(program, model, group, size):
            continue
        places = (nodes[name].meta.get(FIXED_AT, {}).get(axis) for name, axis in group)
        place = next((f" at {place}" for place in places if place), "")
        what = ", ".join(f"{name}[{axis}]" for name, axis in group)
        lines.append(
            f"the size {what} = {size} is fixed in this program{place}, although the model takes others: capture with an "
            "example of the size that you need, and pad inputs to it"
        )
    program.narrower = tuple(lines)
    for line in lines:
        warnings.warn(line, stacklevel=stacklevel + 1)


def _is_bound(expression: Any) -> bool:
    return any(sign in str(expression.rel_op) for sign in "<>")


def _fixed_groups(program: Program) -> Iterator[list[Axis]]:
    """The fixed axes, those of one size together."""
    sizes: dict[int, list[Axis]] = {}
    fixed = {line.split(" = ")[0] for line in program.fixed}
    for spec in program.inputs:
        for axis, size in enumerate(spec.shape):
            if isinstance(size, int) and size > 1 and f"{spec.name}[{axis}]" in fixed:
                sizes.setdefault(size, []).append((spec.name, axis))
    yield from sizes.values()


def _takes_smaller(program: Program, model: nn.Module, group: Iterable[Axis], size: int) -> bool:
    """Whether the model takes one element less, or half of them, along all axes of a group."""
    for smaller in dict.fromkeys((size - 1, size // 2)):
        if smaller < 2:
            continue  # an axis of 1 is broadcast
        batch = dict(program.example)
        for name, axis in group:
            batch[name] = batch[name].narrow(axis, 0, smaller).contiguous()
        try:
            with own_run(model):
                model.eval()
                model(**batch)
        except REFUSED:
            continue
        return True
    return False
