"""What torch.export cannot trace is told in one line: what, where and what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import CaptureError


class Scalar(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, torch.ones((), dtype=torch.bool))


class Converts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear.to(torch.float32)(x)


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (
            Scalar(),
            torch.randn(2, 2, 3, 4),
            r"test_trace_errors\.py:\d+ has a scalar as its mask.*mask\.reshape\(1, 1\)",
        ),
        (
            Converts(),
            torch.randn(2, 4),
            r"test_trace_errors\.py:\d+ \(module\.to\(\.\.\.\)\).*before the model is captured",
        ),
    ],
    ids=["scalar-mask", "converts"],
)
def test_what_cannot_be_traced_is_told(model: nn.Module, x: torch.Tensor, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        bg.capture(model, {"x": x})
