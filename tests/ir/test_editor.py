"""The editor: what replaces a value may be computed from it by several calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import PassError

aten = torch.ops.aten


def test_a_value_computed_in_steps_from_the_old_one_replaces_it() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = x.tanh()
            return y + 1, y.exp()

    program = bg.capture(Twice(), {"x": torch.randn(3)})
    with program.edit() as editor:
        old = next(node for node in editor.graph.nodes if node.target is aten.tanh.default)
        doubled = editor.call(aten.mul.Tensor, old, 2, like=old, after=old)
        negated = editor.call(aten.neg.default, doubled, like=old, after=doubled)
        new = editor.call(aten.add.Tensor, negated, old, like=old, after=negated)
        editor.replace(old, new)
    x = torch.randn(5)
    found = list(program(x=x).values())
    torch.testing.assert_close(found[0], 1 - x.tanh())
    torch.testing.assert_close(found[1], (-x.tanh()).exp())


def test_a_call_that_does_not_fit_is_refused_with_its_shapes() -> None:
    program = bg.capture(nn.Linear(3, 4), (torch.randn(2, 3),))
    with program.edit() as editor:
        linear = next(node for node in editor.graph.nodes if node.target is aten.linear.default)
        x = linear.args[0]
        with pytest.raises(
            PassError,
            match=r"it adds aten.add.Tensor, which does not take linear\[.*, 4\], .*input.*\[.*, 3\]",
        ):
            editor.call(aten.add.Tensor, linear, x, like=linear, after=linear)
    assert len(program.graph.nodes) == 5
