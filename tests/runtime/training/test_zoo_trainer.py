"""Training of every zoo architecture: the step graph, sharded by ZeRO, gives the loss and gradients of autograd."""

from __future__ import annotations

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import SGD, Torch
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.passes import ZeRO
from bmgraph.verify.metrics import relative_error
from tests.helpers.captured import NAMES, captured
from tests.helpers.zoo import BY_NAME, Batch

QUICK = ("bert", "llama")
RATE = 1.0
"""At this learning rate one SGD step changes each parameter by its gradient."""


def first_squared(outputs: Batch, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The squared first output, as a summed loss and a count."""
    first = next(iter(outputs.values()))
    return first.square().sum(), torch.ones_like(first).sum()


def plain_gradients(program: Program, batch: Batch) -> dict[str, torch.Tensor]:
    module = program.module(training=True)
    first = module(*(batch[spec.name] for spec in program.inputs))[0]
    first.square().mean().backward()
    return {name: item.grad for name, item in module.named_parameters() if item.grad is not None}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_a_step_is_plain_autograd(name: str) -> None:
    _, program = captured(name)
    arch = BY_NAME[name]
    batch = arch.example(3, arch.lengths[1])
    backend = Torch(optimizer=SGD(lr=RATE), loss=first_squared, passes=(ZeRO(3),))
    if program.training:
        with pytest.raises(InputError, match="this program cannot train: "):
            bg.compile(program, backend=backend)
        return
    before = {key: tensor.clone() for key, tensor in program.parameters.items()}
    trainer = bg.compile(program, backend=backend)
    trainer.step(batch)
    after = trainer.program().parameters
    expected = plain_gradients(program, batch)
    assert set(expected) == trainer.state.trained_parameters
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for key, gradient in expected.items():
        moved = before[key] - after[key]
        near = float((moved - gradient).norm()) < 1e-4 * scale
        assert near or relative_error(moved, gradient) < 1e-3, key
