"""The plan of a step: its predicted peak is what a dispatch mode measures, at every stage and with the optimizer's phase."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, AdamW, Torch
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.passes import ZeRO
from bmgraph.passes.zero.zero import STAGES
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.training.liveness import Held
from bmgraph.training.optimizers import Optimizer
from bmgraph.training.step_plan import StepPlan
from tests.helpers.live_bytes import measured_peak
from tests.helpers.ranks import run_ranks
from tests.helpers.training import captured_to_train, labelled

WITHIN = 0.1


class Deep(nn.Module):
    """Layers whose activations, for many rows, need more than the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = x + layer(x)
        return {"loss": nn.functional.mse_loss(x, labels)}


def rows(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(count, 16, generator=generator) for key in ("x", "labels")}


@cache
def captured() -> Program:
    torch.manual_seed(0)
    return bg.capture(Deep(), rows(4))


def trainer_of(count: int, *passes: Any, optimizer: Optimizer | None = None, accumulate: int = 1) -> Trainer:
    program = captured().clone()
    program.example = rows(count) if count else {}
    options = Torch(optimizer=optimizer or AdamW(), clip_norm=1.0, accumulate=accumulate)
    made: Trainer = bg.compile(program, passes=passes, backend=options, verify="off")
    return made


@pytest.mark.parametrize("count", [4, 300])
def test_the_predicted_peak_is_the_measured_one(count: int) -> None:
    trainer = trainer_of(count)
    assert trainer.plan.peak.total == pytest.approx(measured_peak(trainer, rows(count)), rel=0.03)
    weights = sum(parameter.nbytes for parameter in trainer.program().parameters.values())
    assert (trainer.plan.parameters, trainer.plan.state) == (weights, 2 * weights)
    assert trainer.plan.traffic == ()
    assert trainer.plan.offloaded == 0
    assert ("update" in trainer.plan.peak.where or "norm" in trainer.plan.peak.where) == (count == 4)


@pytest.mark.slow
def test_micro_batches_need_less() -> None:
    trainer = trainer_of(300, accumulate=3)
    assert trainer.plan.peak.total == pytest.approx(measured_peak(trainer, rows(300)), rel=0.03)
    assert trainer.plan.activations < 0.5 * trainer_of(300).plan.activations


def test_state_is_what_the_optimizer_keeps() -> None:
    assert trainer_of(4, optimizer=SGD()).plan.state == 0
    plan = trainer_of(4, optimizer=SGD(momentum=0.9)).plan
    assert plan.state == plan.parameters


def test_a_table_for_people() -> None:
    text = str(trainer_of(4).plan)
    assert "one rank of 1, one step on x 4x16, labels 4x16" in text
    for line in (
        "parameters and buffers",
        "optimizer state",
        "activations",
        "all together",
        "the peak is at",
    ):
        assert line in text


def test_without_an_example_it_cannot_plan() -> None:
    with pytest.raises(InputError, match="has no example to plan with"):
        _ = trainer_of(0).plan


def _on_ranks(rank: int, size: int) -> dict[int, tuple[int, int, dict[str, int], int]]:
    found = {}
    for stage in STAGES:
        trainer = trainer_of(120, ZeRO(stage))
        plan = trainer.plan
        sizes = {str(held): plan.most(held) for held in Held}
        found[stage] = plan.peak.total, measured_peak(trainer, rows(120)), sizes, plan.sent
    return found


@pytest.mark.slow
def test_stages_on_two_ranks() -> None:
    weights = trainer_of(4).plan.parameters
    for found in run_ranks(2, _on_ranks, 2):
        for stage, (planned, measured, sizes, sent) in found.items():
            assert planned == pytest.approx(measured, rel=WITHIN), stage
            split = STAGES[stage]
            share = {True: weights / 2, False: weights}
            assert sizes["parameters"] == pytest.approx(share[split[0]], rel=0.05), stage
            assert sizes["state"] == pytest.approx(2 * share[split[2]], rel=0.05), stage
            # a gather passes half the weights by each of two ranks, and so do reduce-scatter and half an all-reduce
            gathers = {0: 0, 1: 1, 2: 1, 3: 2}[stage]
            reduced = 1 if split[1] else 2
            # (the layer that is last in forward is first in backward, and gathered once)
            assert sent == pytest.approx((gathers + reduced) * weights / 2, rel=0.15), stage


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
@pytest.mark.parametrize("size", [(3, 9), (16, 40)])
def test_toy_models(name: str, size: tuple[int, int]) -> None:
    program = captured_to_train(name).clone()
    program.example = labelled(name, *size)
    trainer = bg.compile(
        program, passes=[ZeRO(3)], backend=Torch(optimizer=AdamW(), clip_norm=1.0), verify="off"
    )
    plan: StepPlan = trainer.plan
    assert plan.peak.total == pytest.approx(measured_peak(trainer, program.example), rel=WITHIN)
