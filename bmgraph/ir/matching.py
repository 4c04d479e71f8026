"""Predicates on FX nodes and sizes from which graph patterns are built."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

END = 2**63 - 1
"""The `end` that torch.export writes for an `aten.slice` up to the last element."""


def call(node: object, *targets: object) -> fx.Node | None:
    """The node if it calls one of the targets, otherwise None."""
    return (
        node if isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets else None
    )


def through(node: Any, *targets: Any) -> Any:
    """Follow first arguments upstream past calls of the targets; the first node that calls none of them."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets:
        node = node.args[0]
    return node


def only_user(node: fx.Node) -> fx.Node | None:
    """The only user of a node; None if it has none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def equal_sizes(a: object, b: object) -> bool:
    """Whether two sizes are equal as expressions; adds no guard on symbols."""
    left = a.node.expr if isinstance(a, torch.SymInt) else a
    right = b.node.expr if isinstance(b, torch.SymInt) else b
    return bool(left == right)


def plain_size(size: Any) -> Any:
    """A size as an int if it is constant, otherwise as it is."""
    if isinstance(size, torch.SymInt) and size.node.expr.is_number:
        return int(size.node.expr)
    return size
