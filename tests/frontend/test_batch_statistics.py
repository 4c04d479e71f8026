"""Norms without running statistics use those of their input in eval form, too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg


class Standardised(nn.Module):
    """A convolution whose weight is standardised by a batch norm without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, 3))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """f[B, 3, S] -> f[B, 6, S - 2]."""
        rows = self.weight.reshape(1, 6, -1)
        weight = nn.functional.batch_norm(rows, None, None, training=True, momentum=0.0)
        return nn.functional.conv1d(input, weight.reshape_as(self.weight))


@pytest.mark.parametrize(
    "model",
    [Standardised(), nn.InstanceNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)],
    ids=["weights", "instance", "batch"],
)
def test_a_norm_without_running_statistics_is_captured(model: nn.Module) -> None:
    torch.manual_seed(0)
    program = bg.capture(model.train(), (torch.randn(2, 3, 9),))
    assert program.training == ""
    batch = torch.randn(4, 3, 12)
    engine = bg.compile(program, backend="onnx")
    with torch.no_grad():
        expected = model.eval()(batch)
    assert torch.equal(program(input=batch)["output"], expected)
    assert torch.allclose(engine(input=batch)["output"], expected, atol=1e-5)
