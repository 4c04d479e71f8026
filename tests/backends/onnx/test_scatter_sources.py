"""A scatter whose index is shorter than its source is exported, for every size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.verify.metrics import relative_error


class Scattered(nn.Module):
    """Scatters the first half of all rows but the last."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f[B, S] -> f[B, S]."""
        index = torch.arange(x.shape[1] // 2).expand(x.shape[0] - 1, -1)
        if self.way == "scatter_reduce":
            return x.scatter_reduce(1, index, x * 2, "sum")
        return getattr(x * 0, self.way)(1, index, x)


@pytest.mark.parametrize("way", ["scatter", "scatter_add", "scatter_reduce"])
def test_the_source_is_cut_to_the_index(way: str) -> None:
    model = Scattered(way)
    engine = bg.compile(model, example=(torch.randn(3, 6),), backend="onnx")
    x = torch.randn(4, 9)
    assert relative_error(engine(x=x)["output"], model(x)) < 1e-6
