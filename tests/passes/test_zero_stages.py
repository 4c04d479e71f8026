"""Stages 0 to 3 of ZeRO: the losses of one process, what each rank holds, and checkpoints between stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, AdamW, Torch
from bmgraph.errors import BmgraphError, InputError
from bmgraph.passes import ZeRO
from bmgraph.passes.zero.zero import STAGES
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.training.optimizers import Optimizer
from tests.fixtures.write_checkpoints import Small, rows
from tests.helpers.ranks import run_ranks
from tests.helpers.step_passes import HalfStorage

STEPS = 6
HALF = "half storage"


def trainer_of(stage: int | None, *before: Any, optimizer: Optimizer | None = None) -> Trainer:
    torch.manual_seed(0)
    options = Torch(optimizer=optimizer or AdamW(lr=1e-2), clip_norm=0.5)
    shared = [] if stage is None else [ZeRO(stage)]
    made: Trainer = bg.compile(
        Small(nn.LayerNorm), example=rows(0), passes=[*before, *shared], backend=options
    )
    return made


def held(trainer: Trainer) -> dict[str, int]:
    """Elements of values, gradients and moments that this rank has."""
    state = trainer.state
    gradients = trainer.gradients.run(
        [state.rows.share(rows(0), state.ranks.rank, state.ranks.size)]
    ).gradients
    moments = [value for moments in trainer.update.moments.values() for value in moments.values()]
    tensors = {
        "value": [state.tensors[name] for name in state.trained],
        "gradient": list(gradients.values()),
        "state": moments,
    }
    return {
        key: sum(item.untyped_storage().nbytes() // 4 for item in found) for key, found in tensors.items()
    }


@dataclass(frozen=True)
class Failing(SGD):
    """Fails on the last rank at its second update."""

    last: bool = False

    def update(self, *args: Any, **options: Any) -> None:
        if self.last and args[-1] == 2:
            raise ValueError("the rule of this rank fails")
        super().update(*args, **options)


def _failing(rank: int, size: int) -> str:
    trainer = trainer_of(1, optimizer=Failing(lr=0.1))
    trainer.step(rows(0))
    trainer.optimizer = Failing(lr=0.1)
    update = trainer.update
    run = update.run
    update.run = lambda rule, means, rate: run(Failing(lr=0.1, last=rank == size - 1), means, rate)  # type: ignore[method-assign]
    try:
        trainer.step(rows(1))
    except (BmgraphError, ValueError) as error:
        return str(error)
    return ""


def _run(rank: int, size: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage in STAGES:
        trainer = trainer_of(stage)
        losses = [trainer.step(rows(seed)).loss for seed in range(STEPS // 2)]
        trainer.save(f"{folder}/{stage}")
        losses += [trainer.step(rows(seed)).loss for seed in range(STEPS // 2, STEPS)]
        found[f"losses {stage}"] = losses
        found[f"held {stage}"] = held(trainer)
        found[f"parameters {stage}"] = trainer.program().parameters
    trainer = trainer_of(1)
    trainer.load(f"{folder}/3")
    found["from 3 to 1"] = [trainer.step(rows(seed)).loss for seed in range(STEPS // 2, STEPS)]
    for stage in (1, 2, 3):
        trainer = trainer_of(stage, HalfStorage())
        found[f"{HALF} {stage}"] = [trainer.step(rows(seed)).loss for seed in range(STEPS)]
    torch.manual_seed(0)
    normed = bg.capture(Small(nn.BatchNorm1d), rows(0))
    trainer = bg.compile(normed, passes=[ZeRO(3)], backend=Torch(optimizer=SGD(lr=0.1)))
    found["statistics"] = trainer.report.records[-1].compared
    found["failing"] = _failing(rank, size)
    return found


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_stages_on_ranks(size: int, tmp_path: Path) -> None:
    alone = trainer_of(None)
    expected = [alone.step(rows(seed)).loss for seed in range(STEPS)]
    halved = trainer_of(None, HalfStorage())
    half = [halved.step(rows(seed)).loss for seed in range(STEPS)]
    whole = sum(parameter.numel() for parameter in alone.program().parameters.values())
    told = run_ranks(size, _run, size, str(tmp_path))
    for rank, found in enumerate(told):
        for stage, split in STAGES.items():
            assert found[f"losses {stage}"] == pytest.approx(expected, rel=1e-6), stage
            for name, value in alone.program().parameters.items():
                mine = found[f"parameters {stage}"][name]
                assert torch.allclose(mine, value, atol=1e-5), (stage, name)
                assert torch.equal(mine, told[0][f"parameters {stage}"][name]), (stage, name)
            for (what, count), is_split in zip(found[f"held {stage}"].items(), split):
                times = 2 if what == "state" else 1
                share = whole / (size if is_split else 1)
                assert times * share <= count <= times * (share + 7 * size), (stage, what)
            if stage:
                assert found[f"{HALF} {stage}"] == pytest.approx(half, rel=1e-6), stage
        assert found["from 3 to 1"] == pytest.approx(found["losses 3"][STEPS // 2 :], rel=1e-6)
        assert found["statistics"] == "loss and 7 gradients on 6x4"  # of all rows on each rank
        error = found["failing"]
        assert "the rule of this rank fails" in error
        assert error.startswith(f"rank {size - 1}: ") == (rank < size - 1)


@pytest.mark.parametrize("stage", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_saved_at_one_stage_and_resumed_on_one_rank_at_another(stage: int | None, tmp_path: Path) -> None:
    first, second = trainer_of(3), trainer_of(stage)
    for seed in range(2):
        first.step(rows(seed))
    first.save(tmp_path / "saved")
    second.load(tmp_path / "saved")
    assert [first.step(rows(seed)).loss for seed in (2, 3)] == [
        second.step(rows(seed)).loss for seed in (2, 3)
    ]


def test_what_is_kept_is_not_gathered_again() -> None:
    torch.manual_seed(0)
    backend, found = Torch(optimizer=AdamW(lr=1e-2)), []
    for keep in (0, 7 * 5 * 4 + 20, 10**6):  # hidden.weight with its padding
        plan = bg.plan(
            Small(nn.LayerNorm), [ZeRO(3, keep=keep)], example=rows(0), backend=backend, world_size=2
        )
        found += [item.calls for item in plan.traffic if item.kind == "all_gather_into_tensor"]
    assert found[0] > found[1] >= found[2]
    with pytest.raises(InputError, match="keep=8 in stage 1: give the bytes of whole layers"):
        ZeRO(1, keep=8)
