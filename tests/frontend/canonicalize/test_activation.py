"""Activations written out in several operators fold into one; other expressions stay."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import bmgraph as bg


class Of(nn.Module):
    """A function of a linear's output."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 4] -> [B, 6]."""
        return self.function(self.linear(x))


def calls(function: Callable[[torch.Tensor], torch.Tensor]) -> list[tuple[str, object]]:
    """The calls after the linear with their `approximate` option; capture itself proves that values are kept."""
    program = bg.capture(Of(function), (torch.randn(3, 4),))
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    return [
        (str(node.target), node.kwargs.get("approximate"))
        for node in nodes
        if "linear" not in str(node.target)
    ]


@pytest.mark.parametrize(
    ("function", "operator", "approximate"),
    [
        (
            lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
            "aten.gelu.default",
            "tanh",
        ),
        (
            lambda x: x * 0.5 * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
            "aten.gelu.default",
            "tanh",
        ),
        (lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), "aten.gelu.default", None),
        (lambda x: x * torch.sigmoid(x), "aten.silu.default", None),
    ],
)
def test_written_out_activations_fold(
    function: Callable[[torch.Tensor], torch.Tensor], operator: str, approximate: str | None
) -> None:
    assert calls(function) == [(operator, approximate)]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: 0.5 * x * (1 + torch.tanh(0.79 * (x + 0.044715 * x**3))),
        lambda x: torch.tanh(x),
        lambda x: x.clamp(-10, 10) * torch.sigmoid(x),
        lambda x: x.clamp(max=1000.0) * torch.sigmoid(x),
    ],
)
def test_what_computes_something_else_stays(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert not {"aten.gelu.default", "aten.silu.default"} & {name for name, _ in calls(function)}


def test_intermediate_values_stay_where_others_read_them() -> None:
    found = calls(lambda x: torch.cat([x * torch.sigmoid(x), torch.sigmoid(x)]))
    assert [name for name, _ in found].count("aten.sigmoid.default") >= 1
    assert ("aten.silu.default", None) in found
