"""A split along an axis of a free size is exported, for every length."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.verify.metrics import relative_error


class Streams(nn.Module):
    """Joins two streams along the sequence, and takes them apart again."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f[B, S, D] -> f[B, S, D]."""
        both = torch.cat([x, x * x], 1)
        first, second = both.chunk(2, -2) if self.way == "chunk" else both.split(x.shape[1], 1)
        return first + 2 * second


@pytest.mark.parametrize("way", ["chunk", "split"])
def test_a_split_of_a_free_size_is_exported(way: str) -> None:
    model = Streams(way)
    engine = bg.compile(model, example=(torch.randn(2, 6, 4),), backend="onnx")
    x = torch.randn(3, 5, 4)
    assert relative_error(engine(x=x)["output"], model(x)) < 1e-6
