"""Inserts the calls of a delta after its linear, and finds what a delta starts from."""

from __future__ import annotations

from typing import Any

from torch import fx

from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import DELTA, TOTAL, ends_delta
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of


class DeltaCalls:
    """Inserts consecutive calls after a linear, each marked as part of the delta on `site` by the role of its family."""

    def __init__(self, editor: Editor, linear: fx.Node, site: str, role: str) -> None:
        self.linear = linear
        """The linear that the delta is attached to."""
        self._editor, self._site, self._role = editor, site, role
        self._last = linear

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        """Insert one more call after the last one."""
        return self._insert(self._role, target, *args)

    def end(self, target: Any, *args: Any) -> fx.Node:
        """Insert the call that ends the delta, whose first argument is the linear; all users of the linear read it."""
        assert args[0] is self.linear, "a delta changes the output of its linear"
        total = self._insert(self._role if self._role == DELTA else self._role + TOTAL, target, *args)
        self._editor.replace(self.linear, total)
        return total

    def _insert(self, part: str, target: Any, *args: Any) -> fx.Node:
        self._last = self._editor.call(
            target, *args, like=self.linear, after=self._last, site=self._site, part=part
        )
        return self._last


def delta_input(linear: fx.Node) -> fx.Node:
    """The input of a delta: the input of its linear before any rounding."""
    x: Any = linear.args[0]
    while traits_of(x).kind is Kind.ROUNDING:
        x = x.args[0]
    assert isinstance(x, fx.Node)
    return x


def delta_base(total: fx.Node) -> fx.Node:
    """The product that a total changes, below all deltas stacked on it."""
    node: Any = total
    while ends_delta(node):
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node
