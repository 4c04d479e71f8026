"""A batch that cannot be learned from stops the step before anything moves: parameters, statistics, moments, step count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, AdamW, Torch
from bmgraph.errors import InputError
from bmgraph.runtime.training.trainer import Trainer
from tests.helpers.training import naive_losses

Batch = dict[str, torch.Tensor]


class Normed(nn.Module):
    """A batch norm, whose statistics move within the step, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Batch:
        """x f[B, 6], y i64[B] -> loss f[]."""
        return {"loss": nn.functional.cross_entropy(self.last(self.norm(self.first(x))), y)}


class Rooted(nn.Module):
    """A square root, whose gradient is infinite at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Batch:
        """x f[B, 6], y i64[B] -> loss f[]."""
        return {"loss": (self.layer(x)[:, 0].abs().sqrt() * (1 + y.float())).mean()}


class Masked(nn.Module):
    """Attention weights with an additive mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Batch:
        """x f[B, S, 6], mask f[B, S] -> loss f[]."""
        weights = torch.softmax(self.layer(x) @ x.transpose(1, 2) + mask[:, None], -1)
        return {"loss": (weights @ x).square().mean()}


class Regressor(nn.Module):
    """As transformers' heads for one label: both sides are squeezed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Batch:
        """x f[B, 6], y f[B] -> loss f[]."""
        return {"loss": nn.functional.mse_loss(self.layer(x).squeeze(), y.squeeze())}


def batch(rows: int = 8) -> Batch:
    return {"x": torch.randn(rows, 6), "y": torch.randint(0, 3, (rows,))}


def everything(trainer: Trainer) -> Batch:
    """A copy of all that a step may move."""
    moments = {
        f"{name}/{key}": value
        for name, moments in trainer.update.moments.items()
        for key, value in moments.items()
    }
    return {key: value.clone() for key, value in {**trainer.state.tensors, **moments}.items()}


def of_infinity(given: Batch) -> Batch:
    x = given["x"].clone()
    x[0, 0] = float("inf")
    return {**given, "x": x}


def without_labels(given: Batch) -> Batch:
    return {**given, "y": torch.full_like(given["y"], -100)}


def of_another_class(given: Batch) -> Batch:
    return {**given, "y": torch.full_like(given["y"], 7)}


@pytest.mark.parametrize(
    ("model", "change", "error", "message"),
    [
        (Normed, of_infinity, InputError, r"the loss of this batch is nan, .* nothing was changed; .*: 'x' \(1 of 48 values\)"),
        (Normed, without_labels, InputError, "every label is ignored"),
        (Normed, of_another_class, IndexError, "out of bounds"),
        (Rooted, lambda given: {**given, "x": given["x"] * 0}, InputError, r"gradient of 'layer.weight' is not finite .* all inputs are finite"),
    ],
)  # fmt: skip
def test_a_refused_batch_moves_nothing(
    model: type[nn.Module], change: Callable[[Batch], Batch], error: type[Exception], message: str
) -> None:
    trainer = bg.compile(model(), example=batch(), backend=Torch(optimizer=AdamW(lr=1e-2), clip_norm=1.0))
    trainer.step(batch())
    before = everything(trainer)
    with pytest.raises(error, match=message):
        trainer.step(change(batch()))
    assert trainer.steps == 1
    assert all(torch.equal(value, before[key]) for key, value in everything(trainer).items())
    trainer.step(batch())
    assert any(not torch.equal(value, before[key]) for key, value in everything(trainer).items())


def test_the_good_checkpoint_stays(tmp_path: Path) -> None:
    trainer = bg.compile(Normed(), example=batch(), backend=Torch(optimizer=SGD(lr=0.1)))
    trainer.step(batch())
    with pytest.raises(InputError, match="nothing was changed"):
        trainer.step(of_infinity(batch()))
    trainer.save(tmp_path / "half")
    trainer.load(tmp_path / "half")
    assert all(tensor.isfinite().all() for tensor in trainer.program().tensors().values())


def test_an_additive_mask_of_infinity_is_an_input_like_others() -> None:
    torch.manual_seed(0)
    model, mask = Masked(), torch.zeros(4, 5)
    mask[1, 3:] = float("-inf")
    given = {"x": torch.randn(4, 5, 6), "mask": mask}
    trainer = bg.compile(model, example=given, backend=Torch(optimizer=SGD(lr=0.1)))
    found = [trainer.step(given).loss for _ in range(2)]
    assert found == pytest.approx(
        naive_losses(model, torch.optim.SGD(model.parameters(), lr=0.1), [given] * 2), abs=1e-6
    )


def test_a_last_batch_of_one_row() -> None:
    torch.manual_seed(0)
    model = Regressor()
    given = [{"x": torch.randn(rows, 6), "y": torch.randn(rows)} for rows in (4, 1, 2)]
    trainer = bg.compile(model, example=given[0], backend=Torch(optimizer=SGD(lr=0.1)))
    found = [trainer.step(item).loss for item in given]
    expected = naive_losses(model, torch.optim.SGD(model.parameters(), lr=0.1), given)
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_kind_of_batch_that_there_is_not() -> None:
    with pytest.raises(InputError, match="batch='all': choose one of whole, rank"):
        Torch(batch="all")
