"""Weight decay leaves norms, biases and embeddings alone, wherever their elements lie."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, AdamW, Torch
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.passes import ZeRO
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.training.optimizers import NoDecay, Optimizer
from bmgraph.training.parameter_groups import PLAIN, Group, runs_of
from bmgraph.training.placement import Piece, Place
from tests.fixtures.write_checkpoints import Small, rows
from tests.helpers.ranks import run_ranks

STEPS = 4
UNDECAYED = {"words.weight", "norm.weight", "norm.bias", "hidden.bias", "head.bias"}


def small() -> Small:
    torch.manual_seed(0)
    model = Small(nn.LayerNorm)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


@cache
def captured() -> Program:
    return bg.capture(small(), rows(0))


def trained(optimizer: Optimizer, *passes: ZeRO) -> Trainer:
    trainer: Trainer = bg.compile(captured(), passes=list(passes), backend=Torch(optimizer=optimizer))
    for seed in range(STEPS):
        trainer.step(rows(seed))
    return trainer


def plain(undecayed: set[str], sgd: bool = False) -> dict[str, torch.Tensor]:
    """The parameters after a plain loop with torch's parameter groups."""
    model = small()
    named = dict(model.named_parameters())
    groups = [
        {"params": [named[name] for name in named if name not in undecayed], "weight_decay": 0.5},
        {"params": [named[name] for name in named if name in undecayed], "weight_decay": 0.0},
    ]
    rule: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=0.05, fused=True)
    if sgd:
        rule = torch.optim.SGD(groups, lr=0.05, momentum=0.9, fused=True)
    for seed in range(STEPS):
        rule.zero_grad()
        model(**rows(seed))["loss"].backward()
        rule.step()
    return {name: parameter.detach() for name, parameter in named.items()}


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=2e-6), name


@pytest.mark.parametrize(
    ("no_decay", "undecayed"),
    [
        (True, UNDECAYED),
        pytest.param(False, set(), marks=pytest.mark.slow),
        (("hid*", "norm"), {"hidden.weight", "hidden.bias", "norm.weight", "norm.bias"}),
    ],
)
def test_what_is_not_decayed(no_decay: NoDecay, undecayed: set[str]) -> None:
    found = trained(AdamW(lr=0.05, weight_decay=0.5, no_decay=no_decay)).program().parameters
    check(found, plain(undecayed))


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_groups_within_a_flat_tensor(stage: int, tmp_path: Path) -> None:
    optimizer = SGD(lr=0.05, momentum=0.9, weight_decay=0.5)
    trainer = trained(optimizer, ZeRO(stage))
    check(trainer.program().parameters, plain(UNDECAYED, sgd=True))
    trainer.save(tmp_path / "saved")
    again = bg.compile(captured(), passes=[ZeRO(stage)], backend=Torch(optimizer=optimizer))
    again.load(tmp_path / "saved")
    assert again.step(rows(9)).loss == trainer.step(rows(9)).loss
    for one, other in zip(again.program().parameters.values(), trainer.program().parameters.values()):
        assert torch.equal(one, other)


def _on_a_rank(rank: int, stage: int) -> dict[str, torch.Tensor]:
    return dict(trained(AdamW(lr=0.05, weight_decay=0.5), ZeRO(stage)).program().parameters)


@pytest.mark.slow
def test_groups_split_over_ranks() -> None:
    for found in run_ranks(2, _on_a_rank, 3):
        check(found, plain(UNDECAYED))


def test_runs_of_a_chunk() -> None:
    pieces = (Piece("w", (3,)), Piece("b", (2,), 3), Piece("n", (2,), 5), Piece("v", (2,), 7))
    place = Place(pieces, torch.float32, torch.device("cpu"), packed=True, ranks=2, split=True)
    own = Group(decays=False)
    groups = {"b": own, "n": own}
    assert place.share == 5
    assert runs_of(place, 0, groups) == ((0, 3, PLAIN), (3, 2, own))
    assert runs_of(place, 1, groups) == ((0, 2, own), (2, 3, PLAIN))  # with one element of padding
    assert runs_of(place, 1, {}) == ((0, 0, PLAIN),)
    faster = {"n": Group(factor=16.0), "v": own}
    assert runs_of(place, 0, faster) == ((0, 5, PLAIN),)
    assert runs_of(place, 1, faster) == ((0, 2, faster["n"]), (2, 3, own))


def test_a_pattern_without_a_parameter_is_refused() -> None:
    with pytest.raises(InputError, match=r"no_decay='\*\.nrom' fits no trained parameter; near it: norm"):
        trained(AdamW(no_decay=("*.nrom",)))


def test_another_choice_than_that_of_a_checkpoint_is_told(tmp_path: Path) -> None:
    trained(AdamW(lr=0.05)).save(tmp_path / "saved")
    other = bg.compile(captured(), backend=Torch(optimizer=AdamW(lr=0.05, no_decay=False)))
    with pytest.warns(UserWarning, match="no_decay True -> False"):
        other.load(tmp_path / "saved")
