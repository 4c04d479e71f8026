"""The traced step of a delta of each family has the gradients of autograd, at values away from where deltas begin."""

from __future__ import annotations

import pytest
import torch

import bmgraph as bg
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.passes import Quantize
from bmgraph.training.executor import Runner
from bmgraph.training.joint_graph import trace_step
from tests.helpers.training import batches, captured_to_train
from tests.passes.deltas.test_deltas_on_ranks import FAMILIES

AGREES = 1e-4
"""Of a gradient's norm and a thousandth of that of all."""


def moved(program: Program) -> Program:
    """The program with other values of what trains."""
    generator = torch.Generator().manual_seed(3)
    for name in set(program.parameters) - program.frozen:
        value = program.parameters[name]
        program.parameters[name] = value + 0.05 * torch.randn(value.shape, generator=generator)
    return program


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
@pytest.mark.parametrize(
    "item", [item for item in FAMILIES if item.name != "softtokens"], ids=lambda item: str(item)
)
def test_gradients_are_those_of_autograd(name: str, item: ModelPass) -> None:
    codes = bg.Pipeline([Quantize("int8", activations="none", smallest=1)]).run(captured_to_train(name))
    program = moved(bg.Pipeline([item]).run(codes))
    batch = batches(name, 1)[0]
    found = Runner(trace_step(program, "loss")).run(batch)
    module = program.module(training=True)
    trained = {
        key: value.requires_grad_() for key, value in module.named_parameters() if key not in program.frozen
    }
    values = module(*(batch[spec.name] for spec in program.inputs))
    loss = dict(zip((spec.name for spec in program.outputs), values))["loss"]
    expected = torch.autograd.grad(loss * found.count, list(trained.values()))
    total = torch.stack([gradient.norm() for gradient in expected]).norm()
    assert found.gradients.keys() == trained.keys()
    for key, gradient in zip(trained, expected):
        assert (found.gradients[key] - gradient).norm() <= AGREES * (gradient.norm() + 1e-3 * total), key
