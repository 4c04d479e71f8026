"""One backward against eager's: a program that would train something else cannot train."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bmgraph as bg
from bmgraph.backends import SGD, Torch
from bmgraph.errors import InputError
from bmgraph.frontend import backward_check
from bmgraph.passes import Distill
from tests.helpers.backwards import Clip, Reverse, Round, Square
from tests.helpers.models import tiny_encoder, tokens

FUNCTIONS = {"reverse": Reverse, "round": Round, "square": Square, "clip": Clip}


class Model(nn.Module):
    """Two linears with something between them that `how` names."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """x f[B, 6], y f[B, 2] -> loss f[], out f[B, 2]."""
        h = self.a(x)
        if self.how == "hook" and h.requires_grad:
            h.register_hook(lambda g: -g)
        elif self.how == "inference_mode":
            with torch.inference_mode():
                h = self.a(x).clone()
            h = h.clone()
        elif self.how == "write under no_grad":
            h = h + 0.0
            with torch.no_grad():
                h.clamp_(min=0)
        elif self.how == "reentrant":
            h = checkpoint(self.b.forward, h, use_reentrant=True)
            return {"loss": nn.functional.mse_loss(h, y)}
        elif self.how in FUNCTIONS:
            h = FUNCTIONS[self.how].apply(h)
        out = self.b(h)
        return {"loss": nn.functional.mse_loss(out, y), "out": out}


def example() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(8, 6), "y": torch.randn(8, 2)}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("reverse", r"in 2 of 4 parameters, most in 'a\..*Function Reverse at .*test_backward_check\.py:\d+"),
        ("round", r"in 2 of 4 parameters.*Function Round at .*detach\(\)"),
        ("clip", r"backward of 'a\..*' is not linear.*Function Clip"),
        ("hook", r"in 2 of 4 parameters.*a gradient hook at .*test_backward_check\.py:\d+"),
        (
            "inference_mode",
            r"in 2 of 4 parameters.*an inference_mode region at .*test_backward_check\.py:\d+",
        ),
        ("write under no_grad", "in 2 of 4 parameters"),
        ("reentrant", "cannot be compared.*use_reentrant=False"),
    ],
)
def test_another_backward_cannot_train(how: str, message: str) -> None:
    program = bg.capture(Model(how), example(), prove="training")
    with pytest.raises(InputError, match=message):
        bg.compile(program, backend=Torch(optimizer=SGD(lr=0.1)))
    assert program.backward == ""


@pytest.mark.parametrize("how", ["", "square"])
def test_an_equal_backward_trains_and_is_told(how: str) -> None:
    trainer = bg.compile(Model(how), example=example(), backend=Torch(optimizer=SGD(lr=0.1)))
    assert "backward: equals the model's in 4 of 4 parameters that train" in trainer.report.notes


def test_compile_asks_where_the_backend_trains() -> None:
    model = Model("reverse")
    with pytest.raises(InputError, match="Reverse"):
        bg.compile(model, example=example(), backend=Torch(optimizer=SGD(lr=0.1)))
    bg.compile(model, example=example(), backend=Torch())


def test_compile_asks_where_a_pass_trains() -> None:
    resources = {"teacher": Model(""), "text": [example()]}
    with pytest.raises(InputError, match=r"pass distill.*Reverse"):
        bg.compile(
            Model("reverse"), [Distill(on="outputs", steps=1)], example=example(), resources=resources, backend=Torch()
        )  # fmt: skip


def test_a_program_that_was_not_compared_says_so() -> None:
    program = bg.capture(Model(""), example())
    trainer = bg.compile(program, backend=Torch(optimizer=SGD(lr=0.1)))
    assert any("not compared with the model's" in note for note in trainer.report.notes)


def test_hooks_on_parameters() -> None:
    masked, stepping = Model(""), Model("")
    masked.a.weight.register_hook(lambda g: g * 0.5)
    assert (
        "in 1 of 4 parameters, most in 'a.weight'" in bg.capture(masked, example(), prove="training").training
    )
    stepping.b.bias.register_post_accumulate_grad_hook(lambda p: None)
    assert "'b.bias' has a post-accumulate" in bg.capture(stepping, example(), prove="training").training


def test_frozen_parameters_are_left_out() -> None:
    model = Model("reverse")
    model.a.requires_grad_(False)
    program = bg.capture(model, example(), prove="training")
    assert not program.training
    assert "2 of 2 parameters" in program.backward


def test_dropout_attention_and_norms_are_no_difference() -> None:
    program = bg.capture(tiny_encoder(), tokens(), prove="training")
    assert not program.training
    count = len(program.parameters)
    assert program.backward.startswith(f"backward: equals the model's in {count} of {count} parameters")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_against_fp32(dtype: torch.dtype) -> None:
    x, y = example().values()
    for how, trains in (("", True), ("reverse", False)):
        program = bg.capture(Model(how).to(dtype), {"x": x.to(dtype), "y": y.to(dtype)}, prove="training")
        assert (not program.training) == trains


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    given = example()
    monkeypatch.setattr(backward_check, "MEMORY_LIMIT", 1000)
    program = bg.capture(Model("reverse"), given, prove="training")
    assert "most in 'a.bias'" in program.training
    part = bg.capture(Model(""), given, prove="training")
    assert "in 3 of 4 parameters that train (the smallest ones: the check may hold" in part.backward
    monkeypatch.setattr(backward_check, "MEMORY_LIMIT", 100)
    assert "not compared" in bg.capture(Model(""), given, prove="training").backward


def test_the_model_is_left_as_it_was() -> None:
    model, given = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), torch.randn(8, 6)
    model[0].weight.grad = torch.ones(5, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seed = torch.random.get_rng_state()
    program = bg.capture(model, {"input": given}, prove="training")
    assert not program.training
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones(5, 6))
    assert model[0].bias.grad is None
