"""The sizes that an engine is built for: a least, a usual and a largest one for every dynamic size."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import Dim, Range

GROWTH = 8
"""How many times the example's size is the largest one, where none is asked for."""


@dataclass(frozen=True)
class Sizes:
    """What one dynamic size may be."""

    least: int
    usual: int
    largest: int


def choose_sizes(program: Program, asked: Sequence[tuple[str, int, int, int]]) -> dict[str, Sizes]:
    """The sizes of every dynamic dimension of the inputs, by its name: those asked for, else from the example.

    Raises InputError for a name that no input has, and for sizes out of order or out of the program's range.
    """
    seen = _example_sizes(program)
    given = {name: Sizes(least, usual, largest) for name, least, usual, largest in asked}
    for name, sizes in given.items():
        if name not in seen:
            close = difflib.get_close_matches(name, seen, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(
                f"sizes name {name!r}, which no input has (dynamic: {', '.join(seen) or 'none'}){hint}"
            )
        _check(name, sizes, program.ranges.get(name, Range()))
    return {
        name: given.get(name) or _by_default(usual, program.ranges.get(name, Range()))
        for name, usual in seen.items()
    }


def _check(name: str, sizes: Sizes, bounds: Range) -> None:
    if not 0 <= sizes.least <= sizes.usual <= sizes.largest or sizes.largest < 1:
        raise InputError(
            f"sizes of {name!r} are {sizes.least}, {sizes.usual}, {sizes.largest}: give least, usual, largest"
        )
    if sizes.least < bounds.low or (bounds.high is not None and sizes.largest > bounds.high):
        limit = "any" if bounds.high is None else bounds.high
        raise InputError(
            f"sizes of {name!r} are {sizes.least} to {sizes.largest}: this program takes {bounds.low} to {limit}"
        )


def _by_default(usual: int, bounds: Range) -> Sizes:
    largest = usual * GROWTH
    return Sizes(bounds.low, usual, largest if bounds.high is None else max(usual, min(largest, bounds.high)))


def _example_sizes(program: Program) -> dict[str, int]:
    """The dynamic sizes by name, with what they are in the example (1 where it does not tell)."""
    found: dict[str, int] = {}
    for spec in program.inputs:
        shape = program.example[spec.name].shape if spec.name in program.example else [None] * len(spec.shape)
        for dim, size in zip(spec.shape, shape):
            for name in names_in(dim):
                if size is not None and name == dim:
                    found[name] = int(size)
                else:
                    found.setdefault(name, max(1, program.ranges.get(name, Range()).low))
    return found


def names_in(dim: Dim) -> list[str]:
    """The names of dynamic sizes that a dimension is made of."""
    if isinstance(dim, int):
        return []
    return [node.id for node in ast.walk(ast.parse(dim, mode="eval")) if isinstance(node, ast.Name)]


def value_of(dim: Dim, sizes: Mapping[str, int]) -> int:
    """A dimension such as `past + sequence`, given the sizes that it is made of.

    Raises InputError for an expression of anything but sums, differences and products.
    """
    return dim if isinstance(dim, int) else _value(ast.parse(dim, mode="eval").body, sizes)


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, sizes), _value(node.right, sizes)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
    raise InputError(
        f"a size of an input is {ast.unparse(node)!r}: only sums, differences and products can be built for"
    )
