"""Sizes that depend on others: sums of products of named sizes, such as `past + 2*sequence`, read from their text once."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

Size = TypeVar("Size")

HIGHEST_POWER, MOST_TERMS = 8, 64
"""A size that is raised to a higher power, or has more terms, is none that can be computed here."""

Terms = dict[tuple[str, ...], int]
"""Names that are multiplied, in alphabetical order -> how often their product counts."""


@dataclass(frozen=True)
class SymbolicDim:
    """A size as a sum of products of named sizes: (factor, names) for each term, in the order that their text has."""

    terms: tuple[tuple[int, tuple[str, ...]], ...]

    @staticmethod
    def of(dim: int | str) -> SymbolicDim | None:
        """The size that a number or a text stands for; None for another form, such as `sequence//2`."""
        return _parsed(str(dim))

    @property
    def names(self) -> tuple[str, ...]:
        """The names that the size depends on, each once."""
        return tuple(dict.fromkeys(name for _, names in self.terms for name in names))

    def at(self, sizes: Mapping[str, Size]) -> Size:
        """The size, given those that it depends on (numbers, or sizes of a shape environment)."""
        total: Size | None = None
        for factor, names in self.terms:
            product = _product(factor, [sizes[name] for name in names])
            total = product if total is None else total + product  # type: ignore[operator,assignment]
        return 0 if total is None else total  # type: ignore[return-value]

    def __str__(self) -> str:
        text = ""
        for factor, names in self.terms:
            number = [] if abs(factor) == 1 and names else [str(abs(factor))]
            sign = " - " if factor < 0 else " + "
            text += (sign if text else sign.strip(" +")) + "*".join([*number, *names])
        return text or "0"


def _product(factor: int, sizes: list[Size]) -> Size:
    product: Size | None = None
    for size in sizes:
        product = size if product is None else product * size  # type: ignore[operator]
    if product is None:
        return factor  # type: ignore[return-value]
    return product if factor == 1 else product * factor  # type: ignore[operator,return-value]


@lru_cache(maxsize=4096)
def _parsed(text: str) -> SymbolicDim | None:
    try:
        terms = _terms(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    if terms is None:
        return None
    found = [(factor, names) for names, factor in terms.items() if factor]
    found.sort(
        key=lambda term: (not term[1], term[1])
    )  # alphabetical, a plain number last, as sympy writes it
    return SymbolicDim(tuple(found))


def _terms(node: ast.expr) -> Terms | None:
    """The terms of an expression of names, numbers, +, -, * and powers; None for another form."""
    if isinstance(node, ast.Name):
        return {(node.id,): 1}
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return {(): node.value}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _multiplied(_terms(node.operand), {(): -1})
    if not isinstance(node, ast.BinOp):
        return None
    if isinstance(node.op, ast.Pow):
        power = node.right.value if isinstance(node.right, ast.Constant) else None
        if type(power) is not int or not 1 <= power <= HIGHEST_POWER:
            return None
        base = result = _terms(node.left)
        for _ in range(power - 1):
            result = _multiplied(result, base)
        return result
    left, right = _terms(node.left), _terms(node.right)
    if isinstance(node.op, ast.Mult):
        return _multiplied(left, right)
    if isinstance(node.op, ast.Add):
        return _added(left, right)
    return _added(left, _multiplied(right, {(): -1})) if isinstance(node.op, ast.Sub) else None


def _added(left: Terms | None, right: Terms | None) -> Terms | None:
    if left is None or right is None:
        return None
    return {names: left.get(names, 0) + right.get(names, 0) for names in (*left, *right)}


def _multiplied(left: Terms | None, right: Terms | None) -> Terms | None:
    if left is None or right is None or len(left) * len(right) > MOST_TERMS:
        return None
    product: Terms = {}
    for mine, factor in left.items():
        for theirs, other in right.items():
            names = tuple(sorted((*mine, *theirs)))
            if len(names) > HIGHEST_POWER:
                return None
            product[names] = product.get(names, 0) + factor * other
    return product


def is_name(dim: object) -> bool:
    """Whether a size is a single name, not a number or an expression."""
    return isinstance(dim, str) and dim.isidentifier()


def names_of(dim: int | str) -> tuple[str, ...] | None:
    """The names in a size; None if it is not a sum of products of names and numbers."""
    found = SymbolicDim.of(dim)
    return None if found is None else found.names


def size_of(dim: int | str, sizes: Mapping[str, Size]) -> Size | None:
    """The value of a size; None if it has an unknown name or another form than a sum of products.

    Example:
        >>> size_of("past + 2*sequence", {"past": 3, "sequence": 4})
        11
    """
    if isinstance(dim, int):
        return dim  # type: ignore[return-value]
    found = SymbolicDim.of(dim)
    if found is None or not all(name in sizes for name in found.names):
        return None
    return found.at(sizes)
