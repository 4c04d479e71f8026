"""Operators that engines read otherwise than torch are spelled out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import bmgraph as bg


class Computed(nn.Module):
    """A value of integers beside a linear."""

    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.compute = nn.Linear(4, 4), compute

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x f[B, 4], ids [B, 4] -> f[B, 4]."""
        return self.linear(x) + self.compute(ids)


@pytest.mark.parametrize(
    ("compute", "operators"),
    [
        (lambda ids: 1.0 - ids, ["to.dtype", "rsub.Scalar"]),
        (lambda ids: torch.rsub(ids, 1.5, alpha=2), ["to.dtype", "rsub.Scalar"]),
        (lambda ids: 1 - ids, ["rsub.Scalar"]),
        (lambda ids: (ids > 2) + (ids < 1), ["logical_or.default"]),
    ],
)
def test_what_is_computed_of_integers_is_the_same_in_an_engine(
    compute: Callable[[torch.Tensor], torch.Tensor], operators: list[str]
) -> None:
    x, ids = torch.linspace(-1, 1, 12).view(3, 4), torch.arange(12).view(3, 4) % 5
    model = Computed(compute)
    program = bg.capture(model, (x, ids))
    found = [str(node.target).removeprefix("aten.") for node in program.graph.nodes]
    assert [name for name in found if name in ("to.dtype", "rsub.Scalar", "logical_or.default")] == operators
    engine = bg.compile(program, backend="onnx")
    with torch.no_grad():
        assert torch.allclose(engine(x=x, ids=ids)["output"], model(x, ids), atol=1e-5)
