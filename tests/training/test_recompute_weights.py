"""Expressions of parameters that are computed again in backward: what may be, and what must not."""

from __future__ import annotations

import torch
from torch import nn

import bmgraph as bg
from bmgraph.training.executor import Runner
from bmgraph.training.joint_graph import trace_step
from bmgraph.verify.metrics import relative_error


class DroppedWeight(nn.Module):
    """Drops entries of its weight, as DropConnect does."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """x f[B, 6] -> loss f[]."""
        w = nn.functional.dropout(self.w, 0.5, self.training)
        return {"loss": nn.functional.linear(x, w).square().mean()}


def test_backward_reads_the_dropped_entries_of_forward() -> None:
    model, x = DroppedWeight().train(), torch.randn(4, 6)
    step = trace_step(bg.capture(model, {"x": x}), "loss")
    torch.manual_seed(3)
    found = Runner(step).run({"x": x})
    torch.manual_seed(3)
    model(x)["loss"].backward()
    assert relative_error(found.gradients["w"] / found.count, model.w.grad) < 1e-5
