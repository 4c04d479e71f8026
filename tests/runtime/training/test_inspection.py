"""`trainer.inspect`: figures of single parameters, from the parts of flat tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import SGD, Torch
from bmgraph.errors import InputError
from bmgraph.passes import ZeRO
from bmgraph.runtime.training.trainer import Trainer
from tests.helpers.ranks import run_ranks
from tests.helpers.words import Words, batch_of, words


def trainer_of(*passes: ZeRO) -> Trainer:
    model = words()
    model.drop.p = 0.0
    made: Trainer = bg.compile(
        model, example=batch_of(0), passes=list(passes), backend=Torch(optimizer=SGD(lr=0.1), clip_norm=0.01)
    )
    return made


def check(trainer: Trainer) -> None:
    first = trainer.inspect("hidden", "*.bias")
    assert {item.gradient_norm for item in first.tensors} == {None}
    model = Words(0.0)
    model.load_state_dict(trainer.program().parameters)
    trainer.step(batch_of(1))
    model(**batch_of(1))["loss"].backward()
    gradients = {
        name: float(value.grad.norm()) for name, value in model.named_parameters() if value.grad is not None
    }
    after = trainer.program().parameters
    found = trainer.inspect("hidden", "*.bias").tensors
    assert [item.name for item in found] == ["hidden.weight", "hidden.bias", "norm.bias", "head.bias"]
    for item in found:
        assert item.shape == tuple(after[item.name].shape)
        assert item.mean == pytest.approx(float(after[item.name].double().mean()), abs=1e-9)
        assert item.std == pytest.approx(float(after[item.name].double().std()), rel=1e-6)
        assert item.gradient_norm == pytest.approx(gradients[item.name], rel=1e-5)


@pytest.mark.parametrize("passes", [(), (ZeRO(3),)])
def test_figures_are_those_of_the_whole_parameters(passes: tuple[ZeRO, ...]) -> None:
    check(trainer_of(*passes))


def _on_a_rank(rank: int) -> None:
    for stage in (1, 3):
        check(trainer_of(ZeRO(stage)))


@pytest.mark.slow
def test_figures_from_the_parts_of_ranks() -> None:
    run_ranks(3, _on_a_rank)


def test_in_a_table_and_in_the_metrics(tmp_path: Path) -> None:
    trainer = trainer_of()
    trainer.fit([batch_of(1)], 2, inspect="head", log_every=2, metrics=tmp_path / "some.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "some.jsonl").read_text().splitlines()]
    assert "tensors" not in lines[0]
    assert lines[1]["tensors"].keys() == {"head.weight", "head.bias"}
    assert lines[1]["tensors"]["head.weight"]["gradient_norm"] > 0
    table = str(trainer.inspect("head")).splitlines()
    assert table[0] == "after step 2"
    assert table[1].split() == ["parameter", "shape", "mean", "std", "gradient", "norm"]
    assert table[2].split()[:2] == ["head.weight", "13x7"]
    with pytest.raises(InputError, match="inspect: 'haed' fits no parameter; near it: head"):
        trainer.inspect("haed")
    assert torch.isfinite(torch.tensor(trainer.inspect().tensors[0].mean))
