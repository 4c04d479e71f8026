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


class Einsum(nn.Module):
    """Attention of two heads by two einsums, in one of several layouts, with a mask and dropout."""

    def __init__(self, scores: str, values: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.scores, self.values = scores, values

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """f[B, S, 8], f[B, S] -> f[B, S, 8]."""
        q, k, v = (p(x).unflatten(-1, (2, 4)) for p in (self.q, self.k, self.v))
        if self.scores.startswith("bh"):
            q, k, v = (item.transpose(1, 2) for item in (q, k, v))
        weights = torch.softmax(torch.einsum(self.scores, q, k) * 0.5 + mask[:, None, None], -1)
        mixed = torch.einsum(self.values, functional.dropout(weights, 0.1, self.training), v)
        if self.values.endswith("bhqd"):
            mixed = mixed.transpose(1, 2)
        result: torch.Tensor = self.o(mixed.flatten(2))
        return result


@pytest.mark.parametrize(
    ("scores", "values"),
    [("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"), ("bhqd, bhkd -> bhqk", "bhqk,bhkd->bhqd")],
)
def test_attention_by_einsum_is_an_attention(scores: str, values: str) -> None:
    model = Einsum(scores, values)
    program = bg.capture(model, {"x": torch.randn(2, 5, 8), "mask": torch.zeros(2, 5)})
    (found,) = program.structure().attentions
    assert (found.heads, found.head_size, found.o, found.path) == (2, 4, "o.weight", "")
    assert found.q is not None
    assert found.q.linear == "q.weight"
    assert not [node for node in program.graph.nodes if node.target is torch.ops.aten.einsum.default]
    given = {"x": torch.randn(3, 7, 8), "mask": -torch.arange(21.0).reshape(3, 7)}
    torch.testing.assert_close(program(**given)["output"], model.eval()(**given))


def test_other_einsums_stay() -> None:
    class Outer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """f[B, S, 4] -> f[B, S, S]: the batch is summed in one, and an axis alone in the other."""
            weights = torch.softmax(torch.einsum("bqd,ckd->qk", x, x), -1)
            return torch.einsum("qk,bkd->bq", weights, x)

    program = bg.capture(Outer(), (torch.randn(2, 5, 4),))
    assert [node.target for node in program.graph.nodes].count(torch.ops.aten.einsum.default) == 2
