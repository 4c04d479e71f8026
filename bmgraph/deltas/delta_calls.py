"""Inserts the calls of a delta after its linear, and finds what a delta starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from bmgraph.errors import PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import DELTA, INPUT, TOTAL, changes_input, ends_delta, is_delta
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of


class DeltaCalls:
    """Inserts consecutive calls after a linear, each marked as part of the delta on `site` by the role of its family."""

    def __init__(
        self,
        editor: Editor,
        linear: fx.Node,
        site: str,
        role: str,
        source: fx.Node | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.linear: Any = linear
        """The linear that the delta is attached to."""
        self.input: Any = delta_input(linear)
        """Its input before any rounding."""
        self.weight: Any = linear.args[1]
        """The expression of its weight [out, in]."""
        self.out_features, self.in_features = _sizes(self.weight)
        self.bias: Any = linear.args[2] if len(linear.args) > 2 else None
        """Its bias [out]; None without one."""
        self.source: Any = source
        """The input of another linear that its delta reads, if the family has one (`LinearFamily.sources`)."""
        self.options: Mapping[str, Any] = options or {}
        """The options of the deltas of which each row takes its own."""
        self._editor, self._site, self._role = editor, site, role
        self._last = linear

    def __call__(self, target: Any, *args: Any, **options: Any) -> fx.Node:
        """Insert one more call after the last one; in front of the linear, for a delta on its input."""
        return self._insert(self._role, target, *args, **options)

    def end(self, target: Any, *args: Any) -> fx.Node:
        """Insert the call that ends the delta, whose first argument is the linear; all users of the linear read it."""
        assert args[0] is self.linear, "a delta changes the output of its linear"
        total = self._insert(self._role if self._role == DELTA else self._role + TOTAL, target, *args)
        self._editor.replace(self.linear, total)
        return total

    def end_input(self, target: Any, *args: Any) -> fx.Node:
        """Insert the call that ends a delta on the input, its first argument, in front of the linear, which alone reads it.

        What rounds the input is copied behind it.
        """
        assert args[0] is self.input, "a delta changes the input of its linear"
        total = self._editor.call(target, *args, like=self.linear, site=self._site, part=self._role + TOTAL)
        changed = total
        for rounding in reversed(_roundings(self.linear)):
            with self._editor.graph.inserting_before(self.linear):
                copy = self._editor.graph.node_copy(rounding)
            copy.update_arg(0, changed)
            changed = copy
        self.linear.update_arg(0, changed)
        return total

    def _insert(self, part: str, target: Any, *args: Any, **options: Any) -> fx.Node:
        if self._role.endswith(INPUT):
            return self._editor.call(target, *args, like=self.linear, site=self._site, part=part, **options)
        self._last = self._editor.call(
            target, *args, like=self.linear, after=self._last, site=self._site, part=part, **options
        )
        return self._last


def _sizes(weight: Any) -> tuple[int, int]:
    out_features, in_features = weight.meta["val"].shape
    return int(out_features), int(in_features)


def delta_input(linear: fx.Node) -> fx.Node:
    """The input of a delta: the input of its linear before any rounding, and before deltas on the input."""
    x: Any = linear.args[0]
    while traits_of(x).kind is Kind.ROUNDING or changes_input(x):
        x = x.args[0]
    assert isinstance(x, fx.Node)
    return x


def input_is_changed(linear: fx.Node) -> bool:
    """Whether a delta changes the input of a linear."""
    return any(map(changes_input, _roundings(linear)))


def _roundings(linear: fx.Node) -> list[fx.Node]:
    """What rounds the input of a linear and changes it, from the linear up."""
    found, x = [], linear.args[0]
    while isinstance(x, fx.Node) and (traits_of(x).kind is Kind.ROUNDING or changes_input(x)):
        found.append(x)
        x = x.args[0]
    return found


def changed_linear(total: fx.Node) -> fx.Node:
    """The product whose output or input a delta changes, below all other deltas on it."""
    if not changes_input(total):
        return delta_base(total)
    waiting = list(total.users)
    while waiting:
        user = waiting.pop()
        if user.target is torch.ops.aten.linear.default and not is_delta(user):
            return user
        waiting += user.users
    raise PassError(
        f"the delta on {total.meta.get('site')} changes the input of a linear that is not there any more"
    )


def delta_base(total: fx.Node) -> fx.Node:
    """The product that a total changes, below all deltas stacked on it."""
    node: Any = total
    while ends_delta(node):
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node
