"""Parses and evaluates sizes that are sums of products of named sizes, such as `past + 2*sequence`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Size = TypeVar("Size")


def is_name(dim: object) -> bool:
    """Whether a size is a single name, not a number or an expression."""
    return isinstance(dim, str) and dim.isidentifier()


def names_of(dim: str) -> list[str] | None:
    """The names in a size; None if it is not a sum of products of names and numbers."""
    factors = [factor for term in dim.split(" + ") for factor in term.split("*")]
    if not all(factor.isidentifier() or factor.isdecimal() for factor in factors):
        return None
    return [factor for factor in factors if factor.isidentifier()]


def size_of(dim: str, sizes: Mapping[str, Size]) -> Size | None:
    """The value of a size; None if it has no names, an unknown name or another form than a sum of products.

    Example:
        >>> size_of("past + 2*sequence", {"past": 3, "sequence": 4})
        11
    """
    names = names_of(dim)
    if not names or not all(name in sizes for name in names):
        return None
    total: Size | None = None
    for term in dim.split(" + "):
        product: Size | None = None
        for factor in term.split("*"):
            value = sizes[factor] if factor.isidentifier() else int(factor)
            product = value if product is None else product * value  # type: ignore[assignment,operator]
        total = product if total is None else total + product  # type: ignore[assignment,operator]
    return total
