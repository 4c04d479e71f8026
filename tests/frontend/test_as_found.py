"""Each module trains in its own mode, and capture leaves the model exactly as it found it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import CaptureError
from bmgraph.verify.metrics import relative_error


class Parts(nn.Module):
    """A frozen batch norm and a quiet dropout beside parts that train."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.quiet = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.drop, self.last = nn.Dropout(0.0), nn.Linear(5, 2)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f[B, 6] -> f[B, 2]."""
        return self.last(self.drop(self.quiet(self.norm(self.first(x)))))


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_parts_in_eval_mode_stay_so_in_training_form() -> None:
    model = Parts().train()
    model.norm.eval()
    model.quiet.eval()
    before, x = modes(model), torch.randn(8, 6)
    program = bg.capture(model, (x,))
    assert program.training == ""
    assert program.writes == ()
    assert relative_error(program.module(training=True)(x)[0], model(x)) < 1e-6
    assert modes(model) == before


def test_a_model_that_is_in_eval_mode_as_a_whole_trains_as_a_whole() -> None:
    model = Parts().eval()
    mean = model.norm.running_mean.clone()
    program = bg.capture(model, (torch.randn(8, 6),))
    assert torch.equal(model.norm.running_mean, mean)
    module = program.module(training=True)
    module(torch.randn(8, 6))
    assert not torch.equal(program.buffers["norm.running_mean"], mean)
    assert not any(modes(model))


class Marks(nn.Module):
    """Changes what it can reach when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls, self.seen = nn.Linear(3, 3), 0, {"a": 1}
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f[B, 3] -> f[B, 3]."""
        self.calls += 1
        if self.training:
            self.count.add_(1)
        self.seen["b"] = 2
        if not torch.compiler.is_compiling():
            random.random()
            np.random.rand()
            torch.rand(2)
        return self.linear(x)


@pytest.mark.parametrize("fails", [False, True])
def test_capture_leaves_nothing_behind(fails: bool) -> None:
    model = Marks().train()
    model.linear.eval()
    model.linear.weight.grad = gradient = torch.ones(3, 3)
    model.linear.bias.requires_grad_(False)
    ran: list[int] = []
    handle = model.linear.register_forward_hook(lambda *_: ran.append(1))
    hooks = dict(model.linear._forward_hooks)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    version = model.count._version
    if fails:
        with pytest.raises(CaptureError):
            bg.capture(model, (torch.randn(2, 4, generator=torch.Generator()),))
    else:
        bg.capture(model, (torch.randn(2, 3, generator=torch.Generator()),))
    assert modes(model) == [True, False]
    assert (model.calls, model.seen, float(model.count)) == (0, {"a": 1}, 0.0)
    assert model.linear.weight.grad is gradient
    assert [item.requires_grad for item in model.parameters()] == [True, False]
    assert model.linear._forward_hooks == hooks
    assert "forward" not in model.__dict__
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.random.get_rng_state(), states[2])
    assert version >= 0
    handle.remove()


def test_hidden_dropout_is_off_where_training_forms_are_compared() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
            self.recurrent, self.cubes = nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True), nn.Dropout3d(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """f[B, S, 8] -> f[B, S, 8]."""
            x = self.attention(x, x, x, need_weights=False)[0]
            return self.recurrent(self.cubes(x[:, :, :, None, None]).flatten(2))[0]

    model, x = Hidden().eval(), torch.randn(2, 5, 8)
    program = bg.capture(model, (x,))
    assert program.training == ""
    assert (
        relative_error(program(x=x)["output.0" if "output.0" in program(x=x) else "output"], model(x)) < 1e-5
    )
