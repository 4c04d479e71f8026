"""Axes that are equally long in the example alone are not tied; those that the model needs equal are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg


class Tagger(nn.Module):
    """Words and their places, with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(9, 4), nn.Embedding(16, 4), nn.Linear(4, 3)

    def forward(
        self, ids: torch.Tensor, places: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """ids i64[B, S], places i64[S], labels i64[B, S] -> loss f[]."""
        found = self.head(self.words(ids) + self.places(places))
        return {"loss": nn.functional.cross_entropy(found.reshape(-1, 3), labels.reshape(-1))}


class TimeFirst(nn.Module):
    """[length, rows, features]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x f[S, B, 4], y f[B] -> f[B, 4]."""
        found: torch.Tensor = torch.softmax(self.layer(x), 0).mean(0) + y.unsqueeze(1)
        return found


class Biased(nn.Module):
    """A bias that is square by its meaning."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """bias f[S, S], x f[B, S, 4] -> f[B, S, 4]."""
        found: torch.Tensor = torch.softmax(self.layer(x) @ x.transpose(1, 2) + bias, -1) @ x
        return found


IDS, LABELS = torch.randint(0, 9, (6, 6)), torch.randint(0, 3, (6, 6))


@pytest.mark.parametrize(
    ("model", "example", "shapes"),
    [
        (Tagger(), {"ids": IDS, "places": torch.arange(6), "labels": LABELS}, "rs s rs"),
        (TimeFirst(), {"x": torch.randn(5, 5, 4), "y": torch.randn(5)}, "sr4 r"),
        (Biased(), {"bias": torch.randn(5, 5), "x": torch.randn(3, 5, 4)}, "ss rs4"),
        (Biased(), {"bias": torch.randn(5, 5), "x": torch.randn(5, 5, 4)}, "ss rs4"),
    ],
)
def test_only_what_must_be_equal_is_tied(
    model: nn.Module, example: dict[str, torch.Tensor], shapes: str
) -> None:
    program = bg.capture(model, example)
    letters: dict[str, object] = {}
    for spec, wanted in zip(program.inputs, shapes.split(), strict=True):
        for dim, letter in zip(spec.shape, wanted, strict=True):
            assert letters.setdefault(letter, dim) == dim, [str(item) for item in program.inputs]
    assert len(set(letters.values())) == len(letters), [str(item) for item in program.inputs]
