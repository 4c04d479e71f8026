"""The update phase: the optimizers' rules are torch's, and storage in another dtype keeps masters with the state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, AdamW, Torch
from bmgraph.errors import InputError
from bmgraph.passes import ZeRO
from bmgraph.runtime.training.checkpoint import STATE_FILE
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.serialize.safetensors_io import read_tensors
from bmgraph.training.optimizers import Moments, Optimizer
from tests.fixtures.write_checkpoints import Small, rows
from tests.helpers.step_passes import HalfStorage

STEPS = 6

RULES: dict[str, tuple[Optimizer, Any]] = {
    "adamw": (
        AdamW(lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
        lambda tensors: torch.optim.AdamW(
            tensors, lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, fused=True
        ),
    ),
    "sgd": (SGD(lr=0.1), lambda tensors: torch.optim.SGD(tensors, lr=0.1, fused=True)),
    "momentum": (
        SGD(lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda tensors: torch.optim.SGD(tensors, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_that_of_torch(name: str) -> None:
    rule, build = RULES[name]
    generator = torch.Generator().manual_seed(0)
    expected = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (0,))]
    found = [tensor.clone() for tensor in expected]
    moments: list[Moments] = [{} for _ in found]
    reference = build(expected)
    for step in range(STEPS):
        gradients = [torch.randn(tensor.shape, generator=generator) for tensor in found]
        for tensor, gradient in zip(expected, gradients):
            tensor.grad = gradient.clone()
        for group in reference.param_groups:
            group["lr"] = rule.lr / (step + 1)
        reference.step()
        rule.update(found, gradients, moments, rule.lr / (step + 1), step + 1)
    for tensor, mine, held in zip(expected, found, moments):
        assert torch.equal(tensor, mine)
        for key, value in held.items():
            assert torch.equal(value, reference.state[tensor][key])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AdamW(betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\): give two numbers of 0 or more that are less"),
        (lambda: AdamW(eps=-1.0), "eps=-1.0: give a number of 0 or more"),
        (lambda: AdamW(lr=float("nan")), "lr=nan: give"),
        (lambda: SGD(momentum=-0.1), "momentum=-0.1: give"),
    ],
)
def test_numbers_that_no_rule_takes(build: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()


def trainer_of(*passes: Any) -> Trainer:
    torch.manual_seed(0)
    program = bg.capture(Small(nn.LayerNorm), rows(0))
    options = Torch(optimizer=AdamW(lr=1e-3, no_decay=False), clip_norm=0.5)
    made: Trainer = bg.compile(program, passes=list(passes), backend=options)
    return made


def naive(steps: int) -> tuple[list[float], list[torch.Tensor]]:
    """A plain loop with float32 masters, whose model computes in float32 with the weights rounded to bfloat16."""
    torch.manual_seed(0)
    model = Small(nn.LayerNorm)
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    rule = torch.optim.AdamW(masters, lr=1e-3, fused=True)
    losses = []
    for seed in range(steps):
        with torch.no_grad():
            for parameter, master in zip(model.parameters(), masters):
                parameter.copy_(master.bfloat16())
        model.zero_grad()
        loss = model(**rows(seed))["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for parameter, master in zip(model.parameters(), masters):
            master.grad = parameter.grad
        rule.step()
        losses.append(loss.item())
    return losses, masters


@pytest.mark.parametrize(
    "passes",
    [
        (HalfStorage(),),
        pytest.param((ZeRO(1), HalfStorage()), marks=pytest.mark.slow),
        pytest.param((HalfStorage(), ZeRO(3)), marks=pytest.mark.slow),
    ],
)
def test_storage_in_half_precision_keeps_masters(passes: tuple[Any, ...], tmp_path: Path) -> None:
    trainer = trainer_of(*passes)
    assert {trainer.state.tensors[name].dtype for name in trainer.state.trained} == {torch.bfloat16}
    expected, masters = naive(STEPS)
    found = [trainer.step(rows(seed)).loss for seed in range(STEPS // 2)]
    trainer.save(tmp_path / "half")
    found += [trainer.step(rows(seed)).loss for seed in range(STEPS // 2, STEPS)]
    assert found == pytest.approx(expected, rel=1e-6)
    for master, value in zip(masters, trainer.program().parameters.values()):
        assert torch.allclose(master, value, atol=1e-6)
    assert {value.dtype for value in read_tensors(tmp_path / "half" / STATE_FILE).values()} == {torch.float32}
    resumed = trainer_of(*passes)
    resumed.load(tmp_path / "half")
    assert [resumed.step(rows(seed)).loss for seed in range(STEPS // 2, STEPS)] == found[STEPS // 2 :]
