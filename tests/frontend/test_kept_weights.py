"""Capture leaves parameters as it found them, and a program has the weights that it was captured with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.verify.metrics import relative_error


class Rescaled(nn.Module):
    """Halves its weight in place when it is first run in eval mode, and doubles it in training mode."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight, self.halved, self.way = nn.Parameter(torch.randn(4, 4)), False, way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f[B, 4] -> f[B, 4]."""
        if self.halved == self.training:
            factor = 2.0 if self.training else 0.5
            if self.way == "assigned":
                self.weight.data = self.weight.data * factor
            with torch.no_grad():
                if self.way == "data":
                    self.weight.data.mul_(factor)
                elif self.way == "no_grad":
                    self.weight.mul_(factor)
            self.halved = not self.training
        product = x @ self.weight
        return product * 2 if self.halved else product


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", ["data", "no_grad", "assigned"])
def test_weights_that_forward_rescales_are_as_found(way: str, training: bool) -> None:
    model, x = Rescaled(way).train(training), torch.randn(3, 4)
    expected = model(x).detach()
    weight, data = model.weight, model.weight.detach().clone()
    program = bg.capture(model, {"x": x})
    assert model.weight is weight
    assert torch.equal(weight, data)
    assert model.halved == (not training)
    assert relative_error(program(x=x)["output"], expected) < 1e-6
    assert torch.equal(model(x), expected)


class Merging(nn.Linear):
    """Adds its delta to its weight in eval mode, and subtracts it in training mode."""

    def __init__(self) -> None:
        super().__init__(4, 4, bias=False)
        self.delta, self.merged = nn.Parameter(torch.randn(4, 4)), False

    def train(self, mode: bool = True) -> Merging:
        """Set the mode and merge or unmerge."""
        super().train(mode)
        if mode == self.merged:
            self.weight.data += self.delta.data * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """f[B, 4] -> f[B, 4]."""
        result = super().forward(input)
        return result if self.merged else result + input @ self.delta.T


@pytest.mark.parametrize("training", [True, False])
def test_weights_that_a_mode_merges_are_as_found(training: bool) -> None:
    model, x = nn.Sequential(Merging(), nn.ReLU()).train(training), torch.randn(3, 4)
    expected, before = model(x).detach(), model[0].weight.detach().clone()
    program = bg.capture(model, {"input": x}, prove="training")
    assert torch.equal(model[0].weight, before)
    assert model[0].merged == (not training)
    assert program.training == ""
    assert relative_error(program(input=x)["output"], expected) < 1e-6
    model.train(not training)
    assert relative_error(program(input=x)["output"], expected) < 1e-6


def test_weights_that_a_backward_writes_are_as_found() -> None:
    model = nn.Linear(3, 2)
    model.weight.register_hook(lambda gradient: model.weight.data.zero_())
    before = model.weight.detach().clone()
    bg.capture(model, (torch.randn(4, 3),), prove="training")
    assert torch.equal(model.weight, before)


class Announcing(nn.Linear):
    """Has a `train` of its own, as all models of some libraries have, that writes into no weight."""

    def train(self, mode: bool = True) -> Announcing:
        """Set the mode."""
        super().train(mode=mode)
        return self


@pytest.mark.parametrize("prove", [True, False])
def test_weights_that_no_mode_moves_are_not_copied(prove: bool) -> None:
    model = nn.Sequential(Announcing(4, 4), Merging())
    program = bg.capture(model, {"input": torch.randn(3, 4)}, prove=prove)
    shared = [program.parameters[name].is_set_to(item.data) for name, item in model.named_parameters()]
    assert shared == [True, True, False, True]
    assert "train" not in model[0].__dict__
    assert "eval" not in model[0].__dict__
