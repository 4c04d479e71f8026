"""Rows stay in the order of experts between two products, unless something else reads what lies between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.verify.metrics import relative_error
from tests.helpers.sweep import sweep

pytest.importorskip("onnxruntime")

EXPERTS, ACTIVE, WIDTH = 4, 2, 6

Between = Callable[["Two", torch.Tensor, torch.Tensor], torch.Tensor]


class Two(nn.Module):
    """Two products with the same chosen experts; `between` computes the input of the second."""

    def __init__(self, between: Between, twice: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between, self.twice = between, twice
        self.first, self.second = (nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH)) for _ in range(2))
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ids = scores.topk(ACTIVE).indices
        hidden = self.between(self, torch.ops.bmgraph.experts_linear(x, self.first, ids), scores)
        made: torch.Tensor = torch.ops.bmgraph.experts_linear(hidden, self.second, ids).sum(-2)
        return made + hidden.sum(-2) if self.twice else made


CASES: dict[str, tuple[Between, bool, bool]] = {
    "an activation": (lambda model, hidden, scores: torch.relu(hidden), False, True),
    "numbers of places": (lambda model, hidden, scores: torch.tanh(hidden * model.scale) * 2 + hidden, False, True),
    "a gate": (lambda model, hidden, scores: nn.functional.silu(hidden) * hidden, False, True),
    "read elsewhere": (lambda model, hidden, scores: torch.relu(hidden), True, False),
    "a number of each token": (
        lambda model, hidden, scores: hidden * scores.sum(-1, keepdim=True).unsqueeze(-1), False, False,
    ),
    "along a row": (lambda model, hidden, scores: torch.softmax(hidden, -1), False, False),
    "across experts": (lambda model, hidden, scores: hidden.cumsum(-2), False, False),
}  # fmt: skip
"""What lies between, whether it is read twice, and whether rows stay sorted."""


@pytest.mark.parametrize("case", sweep(list(CASES), ["numbers of places", "read elsewhere"]))
def test_rows_stay_sorted_where_each_is_treated_alone(case: str) -> None:
    between, twice, stays = CASES[case]

    def batch(*leading: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(*leading, WIDTH), "scores": torch.randn(*leading, EXPERTS)}

    model = Two(between, twice)
    engine = bg.compile(model, passes=[], backend="onnx", example=batch(3, 4))
    assert ("keep_expert_order" in dict(engine.report.rewrites)) == stays
    for leading in ((1, 1), (2, 7), (5, 3)):
        given = batch(*leading)
        with torch.no_grad():
            assert relative_error(engine(**given)["output"], model(**given)) < 1e-5
