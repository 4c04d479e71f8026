"""Small predicates and walks over FX nodes, for patterns."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

END = 2**63 - 1
"""The end of an `aten.slice` that goes on to the last element, as torch.export writes it."""


def call(node: Any, *targets: Any) -> fx.Node | None:
    """The node where it calls one of the targets, None otherwise."""
    return (
        node if isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets else None
    )


def through(node: Any, *targets: Any) -> Any:
    """The first node upstream that does not call one of the targets, along first arguments."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets:
        node = node.args[0]
    return node


def tensor(node: Any) -> bool:
    """Whether a node's value is a tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def only_user(node: fx.Node) -> fx.Node | None:
    """The single user of a node, None where there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def equal_sizes(a: Any, b: Any) -> bool:
    """Whether two sizes are the same, without adding a guard on symbols."""
    left = a.node.expr if isinstance(a, torch.SymInt) else a
    right = b.node.expr if isinstance(b, torch.SymInt) else b
    return bool(left == right)


def plain_size(size: Any) -> Any:
    """A size as a number, where it is one."""
    if isinstance(size, torch.SymInt) and size.node.expr.is_number:
        return int(size.node.expr)
    return size
