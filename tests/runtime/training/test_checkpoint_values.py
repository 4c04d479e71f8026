"""A checkpoint whose numbers or optimizer state cannot be trained on is refused, and nothing of it is taken over."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.errors import BundleError
from bmgraph.runtime.training.checkpoint import STATE_FILE
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors
from tests.helpers.bundles import edit_json, sign


class Normed(nn.Module):
    """A batch norm, whose statistics training changes, and a constant buffer that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.tensor([0.0, 0.0, float("-inf")]))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """x f[B, 4], y i64[B] -> loss f[]."""
        return {"loss": nn.functional.cross_entropy(self.norm(self.layer(x)) + self.mask, y)}


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(6, 4, generator=generator),
        "y": torch.randint(0, 2, (6,), generator=generator),
    }


def built() -> Trainer:
    torch.manual_seed(0)
    trainer: Trainer = bg.compile(Normed(), example=batch(), backend=Torch(optimizer=AdamW(lr=1e-2)))
    return trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    trainer = built()
    trainer.step(batch())
    trainer.save(tmp_path_factory.mktemp("values") / "good")
    return Path(tmp_path_factory.getbasetemp()) / "values0" / "good"


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    trainer = built()
    trainer.step(batch())
    trainer.step(batch())
    return trainer


def seen(trainer: Trainer) -> tuple[dict[str, bytes], list[dict[str, bytes]], int, int, list[str]]:
    """All that a load may change, as bytes."""
    state = [
        {key: value.numpy().tobytes() for key, value in trainer.update.moments[name].items()}
        for name in trainer.state.trained
    ]  # fmt: skip
    tensors = {name: value.detach().numpy().tobytes() for name, value in trainer.state.tensors.items()}
    return tensors, state, trainer.steps, trainer.seed, list(trainer.report.notes)


def _set(name: str, value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = read_tensors(folder / STATE_FILE)
        tensors[name].view(-1)[-1] = value
        write_tensors(folder / STATE_FILE, tensors)

    return change


def _add(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = read_tensors(folder / STATE_FILE)
        write_tensors(folder / STATE_FILE, {**tensors, name: torch.ones(2)})

    return change


def _say(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "manifest.json", lambda manifest: manifest.update(fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("value/layer.weight", float("nan")), r"holds nan in 'layer.weight' \(1 of 12 values\)"),
        (_set("value/layer.bias", float("inf")), "holds inf in 'layer.bias'"),
        (_set("value/norm.running_mean", float("nan")), "holds nan in 'norm.running_mean'"),
        (_set("exp_avg/norm.weight", float("nan")), "holds nan in the optimizer's exp_avg of 'norm.weight'"),
        (_set("exp_avg_sq/norm.bias", -1.0), "holds -1.0 in the optimizer's exp_avg_sq of 'norm.bias'"),
        (_say(moments=["exp_avg"]), "holds a part of the optimizer's state, or another one"),
        (_say(moments=[["exp_avg"], {}]), "holds a part of the optimizer's state, or another one"),
        (
            _say(moments=["exp_avg", "exp_avg", "exp_avg_sq"]),
            "holds a part of the optimizer's state, or another one",
        ),
        (
            _say(moments=[]),
            r"after 1 updates, and yet lacks AdamW's exp_avg and exp_avg_sq, which would begin anew",
        ),
        (_say(steps=0), "after 0 updates, and yet holds AdamW's exp_avg and exp_avg_sq"),
        (_add("value/other"), "holds 'value/other', which this trainer does not have"),
        (_say(steps=-1), "after fewer than 0 steps"),
        (_say(steps=2**62), "or more than 2"),
        (_say(steps=10**400), "is not a number of 64 bits"),
    ],
)
def test_what_cannot_be_trained_on_changes_nothing(
    saved: Path, trainer: Trainer, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "some"
    shutil.copytree(saved, folder)
    change(folder)
    sign(folder)
    before = seen(trainer)
    with pytest.raises(BundleError, match=message):
        trainer.load(folder)
    assert seen(trainer) == before


def test_warnings_that_are_raised_come_last(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "some"
    shutil.copytree(saved, folder)
    _say(settings={"lr": 5.0})(folder)
    fresh, expected = built(), built()
    expected.load(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"lr 5\.0 -> 0\.01"):
            fresh.load(folder)
    assert seen(fresh)[:4] == seen(expected)[:4]
