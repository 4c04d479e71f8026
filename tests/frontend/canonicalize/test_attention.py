"""Written-out attention keeps its dropout: the probability that acts, in the place where it acts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import bmgraph as bg

functional = nn.functional

Drop = Callable[..., torch.Tensor]
"""(weights, training) -> weights."""


class Attention(nn.Module):
    """Attention with `drop` on its weights."""

    def __init__(self, drop: Drop) -> None:
        super().__init__()
        self.project, self.drop = nn.Linear(8, 24), drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f[B, S, 8] -> f[B, 2, S, 4]."""
        q, k, v = self.project(x).view(x.shape[0], x.shape[1], 2, 12).transpose(1, 2).chunk(3, -1)
        return self.drop(torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1), self.training) @ v


def folded(drop: Drop) -> list[float]:
    """The dropout probabilities of the attention nodes in a program's training form."""
    program = bg.capture(Attention(drop), (torch.randn(2, 5, 8),))
    target = torch.ops.aten.scaled_dot_product_attention.default
    return [
        node.args[4] if len(node.args) > 4 else 0.0 for node in program.graph.nodes if node.target is target
    ]


@pytest.mark.parametrize(
    ("drop", "probability"),
    [
        (lambda w, on: functional.dropout(w, 0.1, on), 0.1),
        (lambda w, on: functional.dropout(w, 0.9, False), 0.0),
        (lambda w, on: functional.dropout(functional.dropout(w, 0.9, False), 0.1, on), 0.1),
        (lambda w, on: functional.dropout(functional.dropout(w, 0.5, on), 0.2, on), 0.6),
    ],
)
def test_the_dropout_that_acts_is_kept(drop: Drop, probability: float) -> None:
    assert folded(drop) == [pytest.approx(probability)]


@pytest.mark.parametrize("drop", [functional.alpha_dropout, functional.dropout2d])
def test_another_kind_of_dropout_is_not_made_a_plain_one(
    drop: Drop,
) -> None:
    assert folded(lambda w, on: drop(w, 0.3, on)) == []
