"""Find symbolic sizes that are not fully dynamic: torch.export drops the guards under which its trace is valid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


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
    guards = list(dict.fromkeys(guard.expr for guard in environment.guards))
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
