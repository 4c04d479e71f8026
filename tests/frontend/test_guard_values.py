"""Guards are evaluated at whole sizes as sympy evaluates them."""

from __future__ import annotations

from itertools import product

import sympy
from torch.utils._sympy.functions import FloorDiv

from bmgraph.frontend.guard_values import value_at

S, T = sympy.symbols("s0 s1", integer=True, positive=True)


def test_as_sympy_does() -> None:
    guards = [
        relation(left, right, evaluate=False)
        for relation in (sympy.Eq, sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge)
        for left, right in ((S, sympy.Integer(5)), (2 * S * T + 3, S + T * 4), (S - T, sympy.Integer(0)))
    ]
    for guard, s, t in product(guards, (2, 3, 5, 8), (2, 4, 5)):
        assert value_at(guard, {S: s, T: t}) == bool(guard.xreplace({S: s, T: t})), (guard, s, t)


def test_what_is_not_plain_is_left_to_sympy() -> None:
    assert value_at(sympy.Eq(FloorDiv(S, 2), 3), {S: 6}) is None
    assert value_at(sympy.Eq(S + T, 7), {S: 3}) is None
    assert value_at(sympy.true, {}) is None
