"""Which sizes of a captured model are really free: torch.export keeps some symbolic under conditions that it drops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def bound_axes(inputs: Mapping[str, torch.Tensor], ranges: Mapping[Any, Any]) -> dict[str, set[int]]:
    """The symbolic axes of the fake `inputs` that cannot take every size of their range.

    The trace took branches that hold for its own sizes, such as "is a multiple of 4"; they are tried at other sizes
    than the traced ones. `ranges` are the bounds of symbols.
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
    conditions = list(dict.fromkeys(guard.expr for guard in environment.guards))
    bound = {symbol for symbol in traced if _is_bound(symbol, traced, conditions, ranges.get(symbol))}
    axes: dict[str, set[int]] = {}
    for name, axis, size in sizes:
        if size.node.expr in bound:
            axes.setdefault(name, set()).add(axis)
    return axes


def _is_bound(symbol: Any, traced: Mapping[Any, int], conditions: list[Any], bounds: Any) -> bool:
    """Whether some condition that held when the model was traced fails at another size within the bounds."""
    here = traced[symbol]
    mine = [condition for condition in conditions if symbol in condition.free_symbols]
    for size in (here + 1, here + 2, here + 3, 2 * here + 1):
        if bounds is not None and not bounds.lower <= size <= bounds.upper:
            continue
        values = {**traced, symbol: size}
        if any(condition.xreplace(values) == False for condition in mine):  # noqa: E712  (sympy's false is no bool)
            return True
    return False
