"""A program that is called again runs what it ran, unless it was edited or given other tensors."""

from __future__ import annotations

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
