"""State that forward keeps in buffers: refused where evaluation changes it, and the user's buffers are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import CaptureError


class Stateful(nn.Module):
    """Counts its calls, or keeps what it saw, in eval mode or only in training."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(8, 8)
        self.register_buffer("steps", torch.ones(()))
        self.register_buffer("seen", torch.zeros(2, 3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "count":
            self.steps.add_(1.0)
        elif self.kind == "assign":
            self.steps = self.steps + 1
        elif self.kind == "cache":
            self.seen[:, :-1] = self.seen[:, 1:].clone()
            self.seen[:, -1] = x[:2, 0]
            return self.linear(self.seen)
        y = self.linear(x) * self.steps
        if self.kind == "train" and self.training:
            self.steps.add_(1.0)
        return y


@pytest.mark.parametrize("kind", ["count", "assign", "cache"])
def test_state_that_evaluation_changes_is_refused(kind: str) -> None:
    model = Stateful(kind)
    name = "seen" if kind == "cache" else "steps"
    with pytest.raises(CaptureError, match=f"forward changes {name} in eval mode too"):
        bg.capture(model, {"x": torch.randn(2, 5, 8)})
    assert float(model.steps) == 1
    assert not model.seen.any()


def test_what_only_training_writes_is_captured() -> None:
    program = bg.capture(Stateful("train"), {"x": torch.randn(2, 5, 8)})
    assert program.writes == ("steps",)
