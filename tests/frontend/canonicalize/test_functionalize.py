"""Writes in place: into a parameter they are refused, since a program does not change its weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import CaptureError


class Clamped(nn.Module):
    """Keeps its weight positive by a write in every forward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.w = how, nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x f[B, 4] -> f[B, 4]."""
        if self.how == "no_grad":
            with torch.no_grad():
                self.w.clamp_(min=0)
        elif self.how == "a row":
            with torch.no_grad():
                self.w[0].mul_(0.5)
        elif self.how == "detach":
            self.w.detach().clamp_(min=0)
        elif self.training:
            with torch.no_grad():
                self.w.clamp_(min=0)
        return x @ self.w


@pytest.mark.parametrize("how", ["no_grad", "a row", "detach"])
def test_a_write_into_a_parameter_is_refused(how: str) -> None:
    with pytest.raises(CaptureError, match="the model's root writes into parameter 'w' in every forward"):
        bg.capture(Clamped(how), {"x": torch.randn(3, 4)})


def test_a_write_in_training_mode_alone_leaves_the_eval_form() -> None:
    program = bg.capture(Clamped("training"), {"x": torch.randn(3, 4)})
    assert "writes into parameter 'w'" in program.training


def test_an_embedding_that_renormalizes_is_refused() -> None:
    with pytest.raises(
        CaptureError, match=r"embedding_renorm_.*writes into parameter 'weight'.*max_norm=None"
    ):
        bg.capture(nn.Embedding(9, 4, max_norm=0.5), {"input": torch.randint(0, 9, (3, 5))})


def test_a_write_through_a_permutation_is_seen_in_its_base() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            base = x + 1
            base.permute(2, 0, -2)[0].mul_(3)
            return base

    x = torch.arange(24.0).view(2, 3, 4)
    program = bg.capture(Writes(), (x,))
    assert torch.equal(program(x=x)["output"], Writes()(x))
