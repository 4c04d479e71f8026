"""A program that is called again runs what it ran, unless it was edited or given other tensors."""

from __future__ import annotations

import weakref

import torch
from torch import nn

import bmgraph as bg
from bmgraph.ir.program import Program

aten = torch.ops.aten
X = torch.randn(3, 4)


def captured() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    return bg.capture(model, {"input": X})


def run(program: Program) -> torch.Tensor:
    return program(input=X)["output"]


def test_it_is_kept() -> None:
    program = captured()
    run(program)
    kept = program._kept
    assert torch.equal(run(program), run(program.clone()))
    assert program._kept is kept


def test_edits_and_new_tensors_are_seen() -> None:
    program = captured()
    before = run(program)
    node = next(node for node in program.graph.nodes if node.target is aten.relu.default)
    node.target = aten.tanh.default
    changed = run(program)
    assert not torch.equal(before, changed)
    node.target = aten.relu.default
    assert torch.equal(run(program), before)
    program.parameters["0.weight"] = program.parameters["0.weight"] * 2
    assert torch.equal(run(program), run(program.clone()))
    assert not torch.equal(run(program), before)
    linear = next(node for node in program.graph.nodes if node.target is aten.linear.default)
    linear.args = linear.args[:2]
    assert torch.equal(run(program), run(program.clone()))


def test_clones_do_not_share_it() -> None:
    program = captured()
    before = run(program)
    other = program.clone()
    other.parameters["2.bias"] = other.parameters["2.bias"] + 1
    assert torch.allclose(run(other), before + 1)
    assert torch.equal(run(program), before)


def test_it_holds_no_weights() -> None:
    program = bg.capture(nn.Linear(4, 2), {"input": X}).to("cpu")
    program.parameters = {name: tensor.clone() for name, tensor in program.parameters.items()}
    run(program)
    kept, weight = program._kept, weakref.ref(program.parameters["weight"])
    del program
    assert kept is not None
    assert weight() is None


class Scaled(nn.Module):
    """Reads inputs that are called as arguments for tensors could be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, tensor_0: torch.Tensor, tensor_1: torch.Tensor) -> torch.Tensor:
        return tensor_0 - 2 * tensor_1 * self.weight + self.bias


def test_inputs_may_have_any_name() -> None:
    program = bg.capture(Scaled(), {"tensor_0": X, "tensor_1": X + 1})
    assert torch.allclose(program(tensor_0=X, tensor_1=X + 1)["output"], X - 2 * (X + 1))
