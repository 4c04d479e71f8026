"""Steps in float16 and steps that are not finite: overflows are halved away and told, and a checkpoint goes on where it was."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, AdamW, LossScale, Torch
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.passes import ZeRO
from bmgraph.runtime.training.trainer import Trainer
from tests.helpers.ranks import run_ranks

Batch = dict[str, torch.Tensor]


class Squares(nn.Module):
    """A regression whose gradients grow with its targets, and an input that multiplies the gradient alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """x f[B, 6], y f[B, 4] -> loss f[]."""
        return {"loss": nn.functional.mse_loss(self.down(torch.relu(self.norm(self.up(x)))).float(), y)}


def made() -> Squares:
    torch.manual_seed(0)
    return Squares()


def batches(count: int = 6, size: float = 1.0) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(6, 6, generator=generator), "y": size * torch.randn(6, 4, generator=generator)}
        for _ in range(count)
    ]


@cache
def captured() -> Program:
    return bg.capture(made(), batches(1)[0])


def trainer_of(*passes: Any, precision: str = "fp16", **options: Any) -> Trainer:
    backend = Torch(**{"optimizer": AdamW(lr=1e-2), "precision": precision, **options})
    trainer: Trainer = bg.compile(captured(), passes=passes, backend=backend)
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: trainer.update.saved(name)[1].clone() for name in trainer.state.trained} | {
        name: trainer.state.tensors[name].clone() for name in trainer.state.outline.buffers
    }


def test_the_rule() -> None:
    rule = LossScale(start=8.0, double_after=2)
    assert rule.after(8.0, 0, overflow=False) == (8.0, 1)
    assert rule.after(8.0, 1, overflow=False) == (16.0, 0)
    assert rule.after(8.0, 1, overflow=True) == (4.0, 0)
    assert rule.after(1.0, 1, overflow=True) == (1.0, 0)
    for wrong in ({"start": 3.0}, {"start": 0.5}, {"double_after": 0}):
        with pytest.raises(InputError, match="give a"):
            LossScale(**wrong)
    with pytest.raises(InputError, match="precision='fp16' alone"):
        Torch(optimizer=SGD(lr=0.1), loss_scale=rule)
    with pytest.raises(InputError, match="on_nan='ignore': choose one of stop, skip"):
        Torch(optimizer=SGD(lr=0.1), on_nan="ignore")


def test_a_planted_overflow_is_halved_away_and_training_goes_on(tmp_path: Path) -> None:
    trainer = trainer_of(loss_scale=LossScale(start=2.0**14, double_after=3), clip_norm=1.0)
    wide = trainer_of(precision="fp32", clip_norm=1.0)
    large, given = batches(1, size=60.0)[0], batches(6)
    before = weights(trainer)
    scales, first = [], trainer.step(large)
    assert "an overflow at loss scale 16384, which is 8192 from now on" in first.skipped
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert not any(trainer.update.moments.values())
    trainer.save(tmp_path / "skipped")  # before any update: no moments yet
    while (found := trainer.step(large)).skipped:
        scales.append(found.scale)
    assert scales == [2.0**14 / 2 ** (index + 1) for index in range(len(scales))]
    assert found.loss == pytest.approx(wide.step(large).loss, rel=1e-2)
    for batch in given:
        mine, theirs = trainer.step(batch), wide.step(batch)
        assert not mine.skipped
        assert (mine.loss, mine.norm) == (
            pytest.approx(theirs.loss, rel=2e-2),
            pytest.approx(theirs.norm, rel=2e-2),
        )
    assert mine.scale == 4 * found.scale  # doubled after three steps, twice
    assert trainer.update.count == trainer.steps - 1 - len(scales)
    trainer.save(tmp_path / "later")
    resumed = trainer_of(ZeRO(3), loss_scale=LossScale(start=2.0**14, double_after=3), clip_norm=1.0)
    resumed.load(tmp_path / "skipped")
    assert resumed.guard.scale == 2.0**13
    resumed.load(tmp_path / "later")
    assert [resumed.step(batch) for batch in given] == [trainer.step(batch) for batch in given]


@pytest.mark.slow
def test_what_the_scale_cannot_mend_stops_or_is_skipped() -> None:
    bad = batches(1)[0]
    bad["y"][0, 0] = float("nan")
    for precision in ("fp32", "fp16"):
        stopping, skipping = trainer_of(precision=precision), trainer_of(precision=precision, on_nan="skip")
        before = weights(stopping)
        with pytest.raises(
            InputError, match=r"loss of this batch is nan, so the step was not taken.*'y' \(1 of 24"
        ):
            stopping.step(bad)
        found = skipping.step(bad)
        assert found.skipped == "the loss of this batch is nan"
        for trainer in (stopping, skipping):
            assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
        assert (stopping.steps, skipping.steps, skipping.update.count) == (0, 1, 0)
        assert skipping.step(batches(1)[0]).loss == stopping.step(batches(1)[0]).loss
        assert weights(skipping).keys() == before.keys()
        assert all(torch.equal(value, weights(stopping)[name]) for name, value in weights(skipping).items())


def test_too_many_skipped_steps_one_after_the_other_stop(tmp_path: Path) -> None:
    good, bad = batches(2)
    bad["y"][0, 0] = float("nan")
    trainer = trainer_of(precision="fp32", on_nan="skip", max_skips=2)
    assert [bool(trainer.step(item).skipped) for item in (bad, good, bad, bad)] == [True, False, True, True]
    trainer.save(tmp_path / "saved")
    with pytest.raises(InputError, match=r"2 steps one after the other were skipped.*'y' \(1 of 24"):
        trainer.step(bad)
    assert trainer.steps == 4
    resumed = trainer_of(precision="fp32", on_nan="skip", max_skips=2)
    resumed.load(tmp_path / "saved")
    with pytest.raises(InputError, match="2 steps one after the other were skipped"):
        resumed.step(bad)
    assert not resumed.step(good).skipped
    assert resumed.step(bad).skipped
    with pytest.raises(InputError, match="max_skips=0: give a number of steps"):
        Torch(optimizer=SGD(lr=0.1), max_skips=0)


@pytest.mark.slow
def test_small_gradients_survive() -> None:
    small = batches(1, size=0.0)[0]
    found = {}
    for scale in (1.0, 2.0**16):
        trainer = trainer_of(loss_scale=LossScale(start=scale), optimizer=SGD(lr=1e4), loss=tiny)
        found[scale] = (
            trainer.step(small).norm,
            weights(trainer)["up.weight"] - captured().parameters["up.weight"],
        )
    assert float(found[1.0][1].abs().max()) == 0
    assert float(found[2.0**16][1].abs().max()) > 0


def tiny(outputs: dict[str, torch.Tensor], inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss whose gradients are below the range of float16."""
    return outputs["loss"] * 1e-8, torch.ones_like(outputs["loss"]).sum()


def on_ranks(rank: int) -> list[tuple[Any, ...]]:
    """Only the rows of rank 1 overflow, and in stage 2 only one rank's shard holds the gradient that does."""
    trainer = trainer_of(
        ZeRO(2), batch="rank", accumulate=2, loss_scale=LossScale(start=2.0**15, double_after=2)
    )
    found = []
    for batch in batches(5):
        scaled = {**batch, "y": batch["y"] * (80.0 if rank == 1 and len(found) == 1 else 1.0)}
        done = trainer.step(scaled)
        found.append((done.loss, done.scale, done.skipped))
    return found


def test_ranks_skip_the_same_steps() -> None:
    first, second = run_ranks(2, on_ranks)
    assert first == second
    assert [scale for _, scale, _ in first[:3]] == [2.0**15, 2.0**15, 2.0**14]
    assert [bool(text) for _, _, text in first] == [False, True, False, False, False]
