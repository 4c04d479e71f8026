"""Finds where a program puts equal values in order: which comes first is not defined, and engines choose otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import Observed
from bmgraph.ir.program import Program
from bmgraph.ops.aten_traits import ALWAYS
from bmgraph.ops.traits import argument, calls, traits_of
from bmgraph.utils.user_frame import user_line
from bmgraph.verify.reference_outputs import EXACT, Batch

aten = torch.ops.aten


def ordered_equals(program: Program, batch: Batch) -> str:
    """The first call whose indices depend on the order of values of which, on this batch, some are equal or closer than rounding,
    with its module and line, and how many are; empty if there is none."""
    observed, found = Observed(program), list[str]()
    by_source: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if traits_of(node).ranks and _gives_indices(node):
            source: Any = node.args[0]
            by_source.setdefault(source.name, []).append(node)

    def visit(name: str, value: torch.Tensor) -> None:
        for node in by_source[name]:
            count = _equal_pairs(node, value)
            if count:
                found.append(f"{_described(node)} orders values of which {count}")

    observed.run(batch, set(by_source) & observed.names, visit)
    return found[0] if found else ""


def _gives_indices(node: fx.Node) -> bool:
    """Whether indices are read of a call, of which they are the only result, or the second of (values, indices)."""
    given = node.meta["val"]
    if isinstance(given, (list, tuple)):
        return any(user.args[1] == 1 and user.users for user in node.users)
    return isinstance(given, torch.Tensor) and traits_of(node).not_negative == ALWAYS


def _equal_pairs(node: fx.Node, values: torch.Tensor) -> int:
    """How many neighbours, in the order that a call puts values in, are equal among those that it tells apart."""
    if not values.numel():
        return 0
    told: Any = argument(node, "k", traits_of(node).ranks)
    dim: Any = argument(node, "dim", None if told == 1 and argument(node, "k") is None else -1)
    rows = values.reshape(1, -1) if dim is None or not values.dim() else values.movedim(dim, -1)
    least = _is_least(node)
    order = rows.double().sort(-1, descending=not least).values
    order = order[..., : told + 1] if told > 0 else order
    near = EXACT.get(values.dtype, 0.0) * rows.double().abs().nan_to_num(0.0, 0.0).amax(-1, keepdim=True)
    return int((order.diff(dim=-1).abs() <= near).sum())


def _is_least(node: fx.Node) -> bool:
    """Whether the first values that a call tells apart are the least."""
    if calls(node, aten.argmin, aten.min, aten.kthvalue):
        return True
    return argument(node, "largest", True) is False


def _described(node: fx.Node) -> str:
    line, scope = user_line(node.meta.get("stack_trace") or ""), node.meta.get("scope")
    return f"{node.target}{f' in {scope}' if scope else ''}{f' at {line}' if line else ''}"
