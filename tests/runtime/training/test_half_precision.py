"""Half-precision models train in float32: the losses of the model in float32, masters and moments in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.ir.program import Program
from bmgraph.passes import LoRA, Quantize, ZeRO
from bmgraph.runtime.training.checkpoint import STATE_FILE
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors
from tests.helpers.bundles import sign
from tests.helpers.training import naive_losses

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
RATE = 1e-4
"""So small that an update is less than half of the last bit of most weights in half precision."""


class Normed(nn.Module):
    """A batch norm, whose statistics are half precision too, and a norm that computes in float32 inside.

    No bias in front of the batch norm: its gradient is rounding alone, of which AdamW makes whole steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """x f[B, 6], y i64[B] -> loss f[]."""
        hidden = self.norm(self.first(x))
        scaled = (hidden.float() * hidden.float().square().mean(-1, keepdim=True).rsqrt()).to(x.dtype)
        return {"loss": nn.functional.cross_entropy(self.last(scaled), y)}


def model(half: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return Normed().to(half)


def batches(half: torch.dtype, count: int = 6) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{"x": torch.randn(8, 6).to(half), "y": torch.randint(0, 3, (8,))} for _ in range(count)]


def captured(half: torch.dtype) -> Program:
    return bg.capture(model(half), batches(half)[0])


def trainer_of(program: Program, **options: Any) -> Trainer:
    trainer: Trainer = bg.compile(program, backend=Torch(optimizer=AdamW(lr=RATE)), **options)
    return trainer


@HALVES
def test_losses_are_those_of_the_model_in_float32(half: torch.dtype) -> None:
    given, eager = batches(half), model(half).float()
    trainer = trainer_of(captured(half), passes=[ZeRO(3)])
    found = [trainer.step(batch).loss for batch in given]
    rule = torch.optim.AdamW(eager.parameters(), lr=RATE)
    wide = [{"x": batch["x"].float(), "y": batch["y"]} for batch in given]
    assert found == pytest.approx(naive_losses(eager, rule, wide), abs=1e-6)
    moments = [value for held in trainer.update.moments.values() for value in held.values()]
    assert {tensor.dtype for tensor in moments} == {torch.float32}
    program = trainer.program()
    assert {tensor.dtype for tensor in program.tensors().values()} == {half, torch.int64}
    for name, value in [*eager.named_parameters(), *eager.named_buffers()]:
        error = (program.tensor(name).float() - value).abs().max()
        assert error <= torch.finfo(half).eps * value.abs().max(), name
    assert program(**given[0])["loss"].isfinite()


@HALVES
@pytest.mark.parametrize("codes", [False, True])
def test_factors_of_a_delta_move_although_the_backbone_is_half(half: torch.dtype, codes: bool) -> None:
    passes = [Quantize("int8", activations="none", smallest=1)] if codes else []
    program = bg.Pipeline([*passes, LoRA(r=2, targets=("*",))]).run(captured(half))
    trainer = trainer_of(program)
    before = {name: trainer.state.tensors[name].clone() for name in trainer.state.trained}
    frozen = {name for name in program.frozen if program.parameters[name].dtype == half}
    for batch in batches(half, 4):
        trainer.step(batch)
    for name, value in before.items():
        after = trainer.state.tensors[name]
        assert after.dtype == torch.float32
        assert (after != value).float().mean() > 0.9, name
    assert all(trainer.state.tensors[name].dtype == half for name in frozen)


def test_masters_are_saved_and_resumed(tmp_path: Path) -> None:
    half = torch.bfloat16
    first, second = trainer_of(captured(half)), trainer_of(captured(half), passes=[ZeRO(3)])
    given = batches(half)
    for batch in given[:3]:
        first.step(batch)
    first.save(tmp_path / "half")
    second.load(tmp_path / "half")
    assert [first.step(batch).loss for batch in given[3:]] == [second.step(batch).loss for batch in given[3:]]


def test_half_precision_moments_of_earlier_versions_are_widened(tmp_path: Path) -> None:
    half = torch.bfloat16
    trainer = trainer_of(captured(half))
    trainer.step(batches(half)[0])
    trainer.save(tmp_path / "old")
    file = tmp_path / "old" / STATE_FILE
    masters = set(trainer.state.trained)
    stored = {
        key: value.to(half) if key.split("/", 1)[1] in masters else value
        for key, value in read_tensors(file).items()
    }
    write_tensors(file, stored)
    sign(tmp_path / "old")
    resumed = trainer_of(captured(half))
    resumed.load(tmp_path / "old")
    for name in resumed.state.trained:
        assert torch.equal(resumed.state.tensors[name], stored[f"value/{name}"].float())
        found = resumed.update.moments[name]["exp_avg"]
        assert found.dtype == torch.float32
        assert torch.equal(found, stored[f"exp_avg/{name}"].float())
    resumed.step(batches(half)[1])


def test_a_float32_program_is_left_as_it_is() -> None:
    from bmgraph.training.fp32_form import in_fp32

    program = captured(torch.float32)
    assert in_fp32(program) is program
