"""LoRA+: B trains at a multiple of the learning rate: equal to torch's parameter groups, wherever the tensors lie, and kept in files."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import AdamW, Linear, Torch
from bmgraph.errors import BundleError, InputError, PassError
from bmgraph.ir.program import Program
from bmgraph.passes import IA3, DoRA, LoadDelta, LoRA, Merge, ZeRO
from tests.fixtures.write_checkpoints import Small, rows
from tests.helpers.bundles import edit_json, sign
from tests.helpers.models import TinyEncoder
from tests.helpers.peft_models import stirred
from tests.helpers.ranks import run_ranks

STEPS, RATE, RATIO, DECAY = 4, 1e-3, 16, 0.1
BIASES = {"hidden.bias", "norm.bias", "head.bias"}


@cache
def tuned() -> Program:
    torch.manual_seed(0)
    program = bg.capture(Small(nn.LayerNorm), rows(0))
    return bg.Pipeline([LoRA(r=2, targets=("hidden", "head"), bias="all", lr_ratio=RATIO)]).run(program)


def trainer_of(program: Program, *passes: ZeRO, **options: Any) -> Any:
    backend = Torch(optimizer=AdamW(lr=RATE, weight_decay=DECAY), schedule=Linear(steps=9), **options)
    return bg.compile(program, passes=list(passes), backend=backend)


def trained(*passes: ZeRO, **options: Any) -> Any:
    trainer = trainer_of(tuned(), *passes, **options)
    for seed in range(STEPS):
        trainer.step(rows(seed))
    return trainer


def plain() -> dict[str, torch.Tensor]:
    """What trains, after a plain loop with torch's parameter groups: A, B and biases."""
    program = tuned().clone()
    program.parameters = {name: value.clone() for name, value in program.parameters.items()}
    module = program.module(training=True)
    named = {
        name: item.requires_grad_() for name, item in module.named_parameters() if name not in program.frozen
    }
    groups = [
        {"params": [item for name, item in named.items() if name.endswith("lora_a")], "lr": RATE},
        {"params": [item for name, item in named.items() if name.endswith("lora_b")], "lr": RATE * RATIO},
        {"params": [named[name] for name in sorted(BIASES)], "lr": RATE * RATIO, "weight_decay": 0.0},
    ]
    assert sum(len(group["params"]) for group in groups) == len(named) == 7  # type: ignore[arg-type]
    rule = torch.optim.AdamW(groups, weight_decay=DECAY)
    rates = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: 1 - (step + 1) / 9)
    for seed in range(STEPS):
        rule.zero_grad()
        module(*(rows(seed)[spec.name] for spec in program.inputs))[0].backward()
        rule.step()
        rates.step()
    return {name: item.detach() for name, item in named.items()}


def check(found: dict[str, torch.Tensor]) -> None:
    for name, value in plain().items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=2e-7), name


@pytest.mark.parametrize(
    ("passes", "options"),
    [
        pytest.param((ZeRO(3),), {}, marks=pytest.mark.slow),
        pytest.param((ZeRO(1),), {}, marks=pytest.mark.slow),
        pytest.param((ZeRO(3),), {"optimizer_in_backward": True}, marks=pytest.mark.slow),
    ],
)
def test_it_is_two_parameter_groups(passes: tuple[ZeRO, ...], options: dict[str, Any]) -> None:
    check(trained(*passes, **options).program().parameters)


def _on_a_rank(rank: int, stage: int) -> dict[str, torch.Tensor]:
    return dict(trained(ZeRO(stage)).program().parameters)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_on_two_ranks(stage: int) -> None:
    for found in run_ranks(2, _on_a_rank, stage):
        check(found)


def test_programs_and_checkpoints_keep_it(tmp_path: Path) -> None:
    program = tuned()
    program.save(str(tmp_path / "program"))
    again = bg.load(tmp_path / "program")
    assert again.lr_factors == program.lr_factors
    assert set(again.lr_factors) == BIASES | {f"{name}.weight_lora_b" for name in ("hidden", "head")}
    trainer = trained()
    check(trainer.program().parameters)
    trainer.save(tmp_path / "saved")
    resumed = trainer_of(again)
    resumed.load(tmp_path / "saved")
    assert resumed.step(rows(9)).loss == trainer.step(rows(9)).loss
    assert torch.equal(resumed.program().parameters["head.bias"], trainer.program().parameters["head.bias"])
    other = program.clone()
    other.lr_factors = {}
    with pytest.warns(UserWarning, match=r"lr_factors \{'16': 5\} -> \{\}"):
        trainer_of(other).load(tmp_path / "saved")
    edit_json(tmp_path / "program" / "program.json", lambda data: data["lr_factors"].update({"nothing": 2.0}))
    sign(tmp_path / "program")
    with pytest.raises(BundleError, match="lr_factors of 'nothing'"):
        bg.load(tmp_path / "program")


def test_other_families_and_loaded_deltas(program: Program, tmp_path: Path) -> None:
    def run(*passes: Any) -> Program:
        return bg.Pipeline(passes).run(program, resources=given, verify="off")

    given = {name: tmp_path / name for name in ("d", "i")}
    dora = run(DoRA(r=2, targets=("q",), loraplus_lr_ratio=4))
    assert {name.rpartition("_")[2] for name in dora.lr_factors} == {"b", "magnitude"}
    stirred(dora).save_delta(str(tmp_path / "d"))
    assert run(LoadDelta("d")).lr_factors == {}
    assert run(LoadDelta("d", lr_ratio=4)).lr_factors == dora.lr_factors
    assert run(LoadDelta("d", lr_ratio=4), Merge()).lr_factors == {}
    stirred(run(IA3())).save_delta(str(tmp_path / "i"))
    with pytest.raises(PassError, match="the delta has no factor that LoRA"):
        run(LoadDelta("i", lr_ratio=4))
    with pytest.raises(InputError, match="lr_ratio=0: give a number above 0"):
        LoRA(lr_ratio=0)


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_the_groups_are_those_of_peft(dora: bool, model: TinyEncoder, program: Program) -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    config = peft.LoraConfig(r=2, target_modules=["q", "up"], bias="all", use_dora=dora)
    theirs = create_loraplus_optimizer(
        peft.get_peft_model(copy.deepcopy(model), config), torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO
    )
    sizes: dict[bool, list[int]] = {False: [], True: []}
    for group in theirs.param_groups:
        sizes[group["lr"] > RATE] += [item.numel() for item in group["params"]]
    item = (DoRA if dora else LoRA)(r=2, targets=("q", "up"), bias="all", lr_ratio=RATIO)
    ours = bg.Pipeline([item]).run(program)
    found: dict[bool, list[int]] = {False: [], True: []}
    for name in set(ours.parameters) - ours.frozen:
        found[name in ours.lr_factors].append(ours.parameters[name].numel())
    assert {key: sorted(value) for key, value in found.items()} == {
        key: sorted(value) for key, value in sizes.items()
    }
