"""Evaluates the guards of a trace at whole sizes: sympy takes a thousand times as long for those that are plain arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import sympy

_RELATIONS: dict[type, Callable[[int, int], bool]] = {
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
    sympy.Lt: operator.lt,
    sympy.Le: operator.le,
    sympy.Gt: operator.gt,
    sympy.Ge: operator.ge,
}


def value_at(guard: Any, values: Mapping[Any, int]) -> bool | None:
    """Whether a relation of sums and products of whole numbers holds at the `values` of its symbols; None if the guard is not
    such a relation, or has other symbols."""
    relation = _RELATIONS.get(type(guard))
    if relation is None:
        return None
    left, right = (_number(side, values) for side in guard.args)
    return None if left is None or right is None else relation(left, right)


def _number(expression: Any, values: Mapping[Any, int]) -> int | None:
    if expression.is_Symbol:
        return values.get(expression)
    if expression.is_Integer:
        return int(expression)
    if type(expression) not in (sympy.Add, sympy.Mul):
        return None
    terms = [_number(term, values) for term in expression.args]
    known = [term for term in terms if term is not None]
    if len(known) < len(terms):
        return None
    return sum(known) if expression.is_Add else prod(known)
