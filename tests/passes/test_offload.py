"""Offload: optimizer state in files or on the host, bit-equal on the CPU, planned, resumed with and without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import SGD, AdamW, Torch
from bmgraph.errors import InputError, OrderError
from bmgraph.pass_manager.pass_base import StepPass
from bmgraph.pass_manager.run_settings import Verify
from bmgraph.passes import Offload, Remat, ZeRO
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.training.file_tensor import zeros_at
from bmgraph.training.optimizers import Optimizer
from bmgraph.training.placement import Place
from tests.helpers.live_bytes import measured_peak
from tests.helpers.ranks import run_ranks
from tests.helpers.step_passes import HalfStorage
from tests.passes.test_remat import captured, rows


def trainer_of(
    *passes: StepPass, optimizer: Optimizer | None = None, verify: Verify = "structure"
) -> Trainer:
    backend = Torch(optimizer=optimizer or AdamW(lr=1e-2), clip_norm=1.0)
    program = captured(0.0).clone()
    program.example = rows(20)
    made: Trainer = bg.compile(program, passes=passes, backend=backend, verify=verify)
    return made


def mapped_files(folder: Path) -> int:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(f" {folder}/" in line and line.endswith("(deleted)") for line in lines)


def test_state_in_files_gives_equal_bits(tmp_path: Path) -> None:
    plain = trainer_of(ZeRO(3))
    passes = Remat("auto"), ZeRO(3), Offload("optimizer", folder=str(tmp_path))
    trainer = trainer_of(*passes, verify="numeric")
    for seed in range(3):
        assert trainer.step(rows(20, seed)) == plain.step(rows(20, seed))
    for name, value in plain.state.tensors.items():
        assert torch.equal(trainer.state.tensors[name], value), name
    assert os.listdir(tmp_path) == []
    if Path("/proc/self/maps").exists():
        assert mapped_files(tmp_path) == 2 * len(trainer.state.trained)
    plan = trainer.plan
    assert (plan.state, plan.offloaded) == (0, plain.plan.state)
    assert plan.peak.total == pytest.approx(measured_peak(trainer, rows(20)), rel=0.05)
    assert "offloaded state" in str(plan)


@pytest.mark.slow
def test_resumes_with_and_without_it(tmp_path: Path) -> None:
    first, other = trainer_of(Offload("optimizer")), trainer_of()
    for seed in range(2):
        first.step(rows(20, seed))
    first.save(tmp_path / "saved")
    other.load(tmp_path / "saved")
    again = trainer_of(Offload("optimizer", folder=str(tmp_path)))
    again.load(tmp_path / "saved")
    losses = [trainer.step(rows(20, 2)).loss for trainer in (first, other, again)]
    losses += [trainer.step(rows(20, 3)).loss for trainer in (first, other, again)]
    assert len(set(losses[:3])) == len(set(losses[3:])) == 1
    assert {name for name in os.listdir(tmp_path) if "state" in name} == set()


@pytest.mark.slow
def test_momentum_and_masters_in_files() -> None:
    for optimizer in (SGD(lr=0.1, momentum=0.9),):
        plain, trainer = (
            trainer_of(optimizer=optimizer),
            trainer_of(Offload("optimizer"), optimizer=optimizer),
        )
        assert [trainer.step(rows(20, seed)).loss for seed in range(3)] == [
            plain.step(rows(20, seed)).loss for seed in range(3)
        ]
    plain, trainer = trainer_of(HalfStorage()), trainer_of(HalfStorage(), Offload("optimizer"))
    assert [trainer.step(rows(20, seed)).loss for seed in range(3)] == [
        plain.step(rows(20, seed)).loss for seed in range(3)
    ]
    assert trainer.plan.offloaded == plain.plan.state


def test_what_is_refused(tmp_path: Path) -> None:
    for what in ("activations", "parameters"):
        with pytest.raises(InputError, match=rf"Offload\('{what}'\) is not built yet"):
            Offload(what)
    with pytest.raises(InputError, match="the one choice is 'optimizer'"):
        Offload("gradients")
    with pytest.raises(InputError, match="is no folder that can be written to"):
        trainer_of(Offload("optimizer", folder=str(tmp_path / "missing")))
    with pytest.raises(OrderError, match=r"passes=\[zero, offload"):
        trainer_of(Offload("optimizer"), ZeRO(3))
    big = torch.empty(2**50, device="meta")
    place = Place.whole("x", big)
    full = Place(place.pieces, torch.float32, torch.device("cpu"), folder=str(tmp_path))
    with pytest.raises(InputError, match="for optimizer state in"):
        zeros_at(full, torch.zeros(1))


def _on_ranks(rank: int, size: int) -> list[tuple[list[float], int, int]]:
    found = []
    for stage in (1, 3):
        trainer = trainer_of(ZeRO(stage), Offload("optimizer"))
        losses = [trainer.step(rows(20, seed)).loss for seed in range(3)]
        found.append((losses, trainer.plan.peak.total, measured_peak(trainer, rows(20))))
    return found


@pytest.mark.slow
def test_on_ranks() -> None:
    plain = trainer_of()
    expected = [plain.step(rows(20, seed)).loss for seed in range(3)]
    for found in run_ranks(2, _on_ranks, 2):
        for losses, planned, measured in found:
            assert losses == pytest.approx(expected, rel=1e-6)
            assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.gpu
def test_on_a_gpu_the_state_is_on_the_host() -> None:
    program = captured(0.0).to("cuda")
    backend = Torch(optimizer=AdamW(lr=1e-2))
    trainer = bg.compile(program, passes=[Offload("optimizer")], backend=backend)
    plain = bg.compile(program, passes=[], backend=backend)
    for seed in range(3):
        batch = {name: value.cuda() for name, value in rows(20, seed).items()}
        assert trainer.step(batch).loss == pytest.approx(plain.step(batch).loss, rel=1e-5)
    for moments in trainer.update.moments.values():
        assert all(moment.device.type == "cpu" for moment in moments.values())
    assert trainer.plan.state == 0 < trainer.plan.offloaded
