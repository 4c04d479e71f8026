"""A parameter in a plain list is not trained as a constant without a word."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.verify.metrics import relative_error


class Listed(nn.Module):
    """Keeps a parameter in a list, which may register it."""

    def __init__(self, registered: bool) -> None:
        super().__init__()
        weights = [nn.Parameter(torch.randn(4, 4))]
        self.weights = nn.ParameterList(weights) if registered else weights
        self.scale = torch.randn(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f[B, 4] -> f[B, 4]."""
        return x @ self.weights[0] * self.scale


@pytest.mark.parametrize("registered", [True, False])
def test_a_parameter_that_is_not_registered_is_told(registered: bool) -> None:
    model, x = Listed(registered), torch.randn(3, 4)
    program = bg.capture(model, (x,))
    assert relative_error(program(x=x)["output"], model(x)) < 1e-6
    if registered:
        assert program.training == ""
    else:
        assert r"weights[0] would stay constant" in program.training
