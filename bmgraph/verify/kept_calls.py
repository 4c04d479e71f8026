"""Checks that the calls which a pass kept are what they were: operators, arguments, and what they read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from bmgraph.errors import VerificationError
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of

Same = Callable[[object, object], bool]


def equal(old: object, new: object) -> bool:
    """Whether two arguments that are no calls are the same."""
    return type(old) is type(new) and bool(old == new)


def check_kept_calls(before: Program, after: Program, by: str, same: Same = equal) -> None:
    """Raise VerificationError where a call that both programs have, by name, has another operator or other arguments.

    In the place of an argument may be a call that the pass `by` made, or, where the argument is gone, what it was computed
    from by casts alone. `same` compares arguments that are no calls.
    """
    for name, old_graph in before.graphs.items():
        new_nodes = {node.name: node for node in after.graphs[name].nodes}
        for old in old_graph.nodes:
            new = new_nodes.get(old.name)
            if new is None or old.op not in ("call_function", "output") or new.meta.get("pass") == by:
                continue
            where = f"{old.name} in {old.meta.get('scope') or 'the root'}"
            if old.target != new.target:
                raise VerificationError(f"{where} was {old.target}, and is {new.target}")
            if not _same([old.args, old.kwargs], [new.args, new.kwargs], new_nodes, by, same):
                raise VerificationError(
                    f"{where} has other arguments: ({_text(old)}) before, ({_text(new)}) after"
                )


def _same(old: Any, new: Any, nodes: dict[str, fx.Node], by: str, same: Same) -> bool:
    if isinstance(old, fx.Node):
        if not isinstance(new, fx.Node):
            return False
        return new.name == old.name or new.meta.get("pass") == by or _cast_away(old, new, nodes)
    if isinstance(old, (list, tuple)):
        fits = isinstance(new, (list, tuple)) and len(old) == len(new)
        return fits and all(_same(one, other, nodes, by, same) for one, other in zip(old, new))
    if isinstance(old, dict):
        fits = isinstance(new, dict) and old.keys() == new.keys()
        return fits and all(_same(value, new[key], nodes, by, same) for key, value in old.items())
    return same(old, new)


def _cast_away(old: Any, new: fx.Node, nodes: dict[str, fx.Node]) -> bool:
    """Whether `new` is what is left of `old`, which was one cast or more."""
    while old.name not in nodes and traits_of(old).kind is Kind.CAST:
        old = old.args[0]
    return bool(old.name == new.name)


def _text(node: fx.Node) -> str:
    return ", ".join([*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())])[:120]
