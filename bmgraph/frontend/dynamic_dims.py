"""Find symbolic sizes that are not fully dynamic: torch.export drops the guards under which its trace is valid."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice, product
from typing import Any

import torch

from bmgraph.frontend.guard_values import value_at
from bmgraph.ir.tensor_spec import Range

MOST_TRIED = 2
"""Largest number of combinations of sizes that are tried because of guards."""

FAR = 64
"""Largest distance from the traced size at which a guard of one size is evaluated: that of a length in front of a few
strides may change only there."""


def constrained_axes(inputs: Mapping[str, torch.Tensor], ranges: Mapping[Any, Any]) -> dict[str, set[int]]:
    """The symbolic axes of the fake `inputs`, by input, that cannot take every size in their range.

    A trace takes the branches of its own sizes, such as "is a multiple of 4". Each guard is evaluated at a few other
    sizes. `ranges` holds the bounds of each symbol.
    """
    sizes: list[tuple[str, int, Any]] = [
        (name, axis, size)
        for name, tensor in inputs.items()
        for axis, size in enumerate(tensor.shape)
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol
    ]
    if not sizes:
        return {}
    environment = sizes[0][2].node.shape_env
    traced = {size.node.expr: int(size.node.hint) for _, _, size in sizes}
    guards = list(dict.fromkeys(environment.replace(guard.expr) for guard in environment.guards))
    constrained = {symbol for symbol in traced if _is_constrained(symbol, traced, guards, ranges.get(symbol))}
    axes: dict[str, set[int]] = {}
    for name, axis, size in sizes:
        if size.node.expr in constrained:
            axes.setdefault(name, set()).add(axis)
    return axes


def _is_constrained(symbol: Any, traced: Mapping[Any, int], guards: list[Any], bounds: Any) -> bool:
    """Whether a guard that held in the trace fails at another size within the bounds."""
    current = traced[symbol]
    relevant = [guard for guard in guards if symbol in guard.free_symbols]
    for size in (current + 1, current + 2, current + 3, 2 * current + 1):
        if bounds is not None and not bounds.lower <= size <= bounds.upper:
            continue
        values = {**traced, symbol: size}
        if any(guard.xreplace(values) == False for guard in relevant):  # noqa: E712  (sympy's false is not a bool)
            return True
    return False


def sizes_that_break_guards(
    inputs: Mapping[str, torch.Tensor], symbols: Mapping[Any, str], ranges: Mapping[str, Range]
) -> list[dict[str, int]]:
    """Combinations of sizes, by name, at which a guard fails that `constrained_axes` passes: the trace may be wrong there.

    A guard between several sizes such as `2 * s0 > s1` has no size of one axis that always breaks it; one of a single
    size may hold at those that are tried there, and fail at smaller or more distant ones. Whether the model has another branch there is for the caller to find out. `symbols` names the symbols of the fake
    `inputs`.
    """
    sizes = _named_sizes(inputs, symbols)
    if not sizes:
        return []
    traced = {symbols[size.node.expr]: int(size.node.hint) for size in sizes}
    guards = dict.fromkeys(guard.expr for guard in sizes[0].node.shape_env.guards)
    found: list[dict[str, int]] = []
    for guard in guards:
        names = sorted({symbols[symbol] for symbol in guard.free_symbols if symbol in symbols} & set(traced))
        if not names or any(_fails(guard, combination, symbols) for combination in found):
            continue
        candidates = [
            _candidates(traced[name], ranges.get(name, Range()), FAR if len(names) == 1 else 0)
            for name in names
        ]
        broken = (
            dict(zip(names, combination))
            for combination in product(*candidates)
            if _fails(guard, dict(zip(names, combination)), symbols)
        )
        found += islice(broken, 1)
        if len(found) == MOST_TRIED:
            break
    return found


def guards_hold(
    inputs: Mapping[str, torch.Tensor], symbols: Mapping[Any, str], sizes: Mapping[str, int]
) -> bool:
    """Whether every guard of the trace holds at some sizes, by name: then the model takes the branches of the trace there."""
    named = _named_sizes(inputs, symbols)
    guards = dict.fromkeys(guard.expr for guard in named[0].node.shape_env.guards) if named else {}
    return not any(_fails(guard, sizes, symbols) for guard in guards)


def _named_sizes(inputs: Mapping[str, torch.Tensor], symbols: Mapping[Any, str]) -> list[Any]:
    return [
        size
        for value in inputs.values()
        for size in value.shape
        if isinstance(size, torch.SymInt) and size.node.expr in symbols
    ]


def _candidates(traced: int, bounds: Range, far: int) -> list[int]:
    """Sizes near the traced one, all up to `far` from it, small and large ones, within the bounds; a size of 1 is
    special to torch."""
    near = [size for step in range(1, far + 1) for size in (traced + step, traced - step) if size > 1]
    wanted = (*near, traced + 1, traced + 3, 2, 3, 2 * traced + 1, 4 * traced + 3)
    return [size for size in wanted if size >= bounds.low and (bounds.high is None or size <= bounds.high)]


def _fails(guard: Any, sizes: Mapping[str, int], symbols: Mapping[Any, str]) -> bool:
    values = {symbol: sizes[name] for symbol, name in symbols.items() if name in sizes}
    found = value_at(guard, values)
    return bool((guard.xreplace(values) if found is None else found) == False)  # noqa: E712  (sympy's false is not a bool)
