"""A checkpoint knows the computation that it was saved from, and the settings; tensors that fit are not enough."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, AdamW, Cosine, Torch
from bmgraph.errors import BundleError
from bmgraph.ir.program import Program
from bmgraph.passes import LoRA, ZeRO
from bmgraph.runtime.training import checkpoint_fit
from bmgraph.runtime.training.trainer import Trainer

Batch = dict[str, torch.Tensor]
PLAIN = Torch(optimizer=AdamW(lr=1e-2))


class Attending(nn.Module):
    """Heads, an activation, a constant buffer and a dropout: none of them changes the shape of a parameter."""

    def __init__(
        self,
        heads: int = 2,
        activation: Callable[[torch.Tensor], torch.Tensor] = torch.relu,
        base: float = 10.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layer, self.heads, self.activation, self.dropout = nn.Linear(16, 16), heads, activation, dropout
        self.register_buffer("steps", base ** -torch.arange(16.0))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Batch:
        """x f[B, S, 16], y f[B, S, 16] -> loss f[], output f[B, S, 16]."""
        wide = self.layer(x + self.steps).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        met = nn.functional.scaled_dot_product_attention(wide, wide, wide).transpose(1, 2).flatten(2)
        output = nn.functional.dropout(self.activation(met), self.dropout, self.training)
        return {"loss": nn.functional.mse_loss(output, y), "output": output}


def batch() -> Batch:
    return {"x": torch.randn(3, 4, 16), "y": torch.randn(3, 4, 16)}


def built(backend: Torch = PLAIN, alpha: float = 0.0, shared: bool = False, **options: object) -> Trainer:
    torch.manual_seed(0)
    program: Program = bg.capture(Attending(**options), batch())  # type: ignore[arg-type]
    passes = [*([LoRA(r=2, alpha=alpha, targets=("*",))] if alpha else []), *([ZeRO(3)] if shared else [])]
    trainer: Trainer = bg.compile(program, passes=passes, backend=backend)
    return trainer


def absolute(outputs: Batch, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    error = outputs["output"] - inputs["y"]
    return error.abs().sum(), torch.ones_like(error).sum()


def squared(outputs: Batch, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    error = outputs["output"] - inputs["y"]
    return error.square().sum(), torch.ones_like(error).sum()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for name, trainer in {"full": built(), "delta": built(alpha=16)}.items():
        trainer.step(batch())
        trainer.save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("full", {"heads": 4}, r"another computation, although its tensors fit: .*4.* here, .*2.* there"),
        ("full", {"activation": torch.tanh}, r"another computation.*tanh.* here, .*relu.* there"),
        ("full", {"dropout": 0.5}, r"another computation.*dropout"),
        ("full", {"base": 20.0}, r"another program: buffer 'steps' has other values"),
        ("delta", {"alpha": 64}, r"another computation.*32.* here, .*8.* there"),
        ("full", {"backend": Torch(optimizer=AdamW(lr=1e-2), loss=squared)}, "another computation"),
    ],
)
def test_another_computation_is_refused(
    saved: Path, name: str, options: dict[str, object], message: str
) -> None:
    trainer = built(**options)  # type: ignore[arg-type]
    before = {key: value.clone() for key, value in trainer.state.tensors.items()}
    with pytest.raises(BundleError, match=message):
        trainer.load(saved / name)
    assert all(torch.equal(value, before[key]) for key, value in trainer.state.tensors.items())


@pytest.mark.slow
def test_another_loss_function_is_refused(tmp_path: Path) -> None:
    built(Torch(optimizer=AdamW(lr=1e-2), loss=absolute)).save(tmp_path / "some")
    built(Torch(optimizer=AdamW(lr=1e-2), loss=absolute)).load(tmp_path / "some")
    with pytest.raises(BundleError, match=r"another computation.*pow.* here, .*abs.* there"):
        built(Torch(optimizer=AdamW(lr=1e-2), loss=squared)).load(tmp_path / "some")


@pytest.mark.slow
def test_the_same_computation_is_resumed_without_a_word(saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built().load(saved / "full")
        built(shared=True).load(saved / "full")
        built(alpha=16).load(saved / "delta")


def test_other_versions_are_told(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_fit, "versions", lambda: {"torch": "9"})
    trainer = built(activation=torch.tanh)
    with pytest.warns(
        UserWarning, match=r"saved by other versions .* that the program is the same was not checked"
    ):
        trainer.load(saved / "full")
    assert trainer.steps == 1


def test_settings_that_changed_are_told(saved: Path) -> None:
    options = AdamW(lr=1e-3, betas=(0.9, 0.95))
    trainer = built(Torch(optimizer=options, schedule=Cosine(steps=5), clip_norm=2.0))
    with pytest.warns(UserWarning, match="other settings, this trainer goes on with its own") as told:
        trainer.load(saved / "full")
    (text,) = [str(item.message) for item in told]
    assert (
        "lr 0.01 -> 0.001, betas [0.9, 0.999] -> [0.9, 0.95], schedule Constant(warmup=0) -> Cosine(" in text
    )
    assert "clip_norm None -> 2.0" in text
    assert text in trainer.report.notes
    assert trainer.step(batch()).rate < 1e-3


def test_settings_of_another_optimizer_are_an_error(saved: Path) -> None:
    with pytest.raises(BundleError, match="was saved with AdamW, this trainer has SGD"):
        built(Torch(optimizer=SGD(lr=0.1))).load(saved / "full")
