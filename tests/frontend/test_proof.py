"""What is proven at capture is what the user runs: other sizes, other values, inputs that were one tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import CaptureError
from bmgraph.verify.metrics import relative_error


class Scored(nn.Module):
    """Reads two inputs of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids, labels i64[B, S] -> f[B, S], f[B, S]."""
        return self.embed(ids).sum(-1), labels * 1.0


@pytest.mark.parametrize("view", [False, True])
def test_one_tensor_under_two_names_stays_two_inputs(view: bool) -> None:
    model = Scored().eval()
    both = torch.randint(0, 9, (2, 3))
    program = bg.capture(model, {"ids": both, "labels": both[:] if view else both})
    ids, labels = torch.randint(0, 9, (4, 5)), torch.zeros(4, 5, dtype=torch.long)
    with torch.no_grad():
        expected = model(ids, labels)
    for found, wanted in zip(program(ids=ids, labels=labels).values(), expected):
        assert relative_error(found, wanted) < 1e-6


class TwoSizes(nn.Module):
    """Takes another path where one size is over twice another."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x f[B, S], y f[T] -> f[B, S]."""
        factor = 2.0 if 2 * x.shape[1] > y.shape[0] else 3.0
        return x * factor + y.sum()


def test_a_branch_between_two_sizes_leaves_one_fixed_and_one_bounded() -> None:
    x, y = torch.randn(2, 5), torch.randn(4)
    program = bg.capture(TwoSizes(), {"x": x, "y": y})
    assert program.inputs[0].shape == ("batch", 5)
    assert program.ranges[program.inputs[1].shape[0]].high == 9
    for length in (3, 9):
        batch = {"x": torch.randn(3, 5), "y": torch.randn(length)}
        assert relative_error(program(**batch)["output"], TwoSizes()(**batch)) < 1e-6


class OnlyPairs(nn.Module):
    """Refuses another number of columns than it was made for, without a guard on the size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f[B, S] -> f[B, S]."""
        if not torch.compiler.is_compiling() and x.shape[1] != 4:
            raise ValueError("4 columns, please")
        return x * 2


def test_a_batch_that_the_model_refuses_is_recorded() -> None:
    program = bg.capture(OnlyPairs(), (torch.randn(2, 4),))
    assert len(program.unproven) == 1
    assert "ValueError: 4 columns, please" in program.unproven[0]
    assert bg.capture(nn.Linear(4, 2), (torch.randn(3, 4),)).unproven == ()


class Remembered(nn.Module):
    """Takes a value of the example for a constant: no guard, no size, only the value differs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f[B] -> f[B]."""
        return x * float(x.detach().numpy().sum()) if not torch.compiler.is_compiling() else x * 2.0


def test_a_value_that_was_taken_for_a_constant_is_seen() -> None:
    with pytest.raises(CaptureError, match="differs from the model"):
        bg.capture(Remembered(), (torch.tensor([0.5, 0.7, 0.8]),))
