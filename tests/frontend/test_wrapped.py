"""Models come wrapped, with any signature of forward; a capture that fails prints one message."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import CaptureError
from bmgraph.verify.metrics import relative_error


class Plain(nn.Module):
    """A layer with a flag and an optional bias."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, double: bool = False
    ) -> torch.Tensor:
        """f[B, 4], f[B, 4] -> f[B, 4]."""
        y = self.linear(x) if bias is None else self.linear(x) + bias
        return y * 2 if double else y


class Outer(nn.Module):
    """Holds a compiled part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f[B, 4] -> f[B, 4]."""
        return self.part(x)


def compiled_in_place() -> nn.Module:
    part = Plain()
    part.compile()
    return Outer(part)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: torch.compile(Plain()), "linear.weight"),
        (lambda: nn.DataParallel(Plain()), "linear.weight"),
        (lambda: torch.compile(nn.DataParallel(Plain())), "linear.weight"),
        (lambda: Outer(torch.compile(Plain())), "part.linear.weight"),
        (compiled_in_place, "part.linear.weight"),
    ],
)
def test_wrappers_are_looked_through(make: Callable[[], nn.Module], name: str) -> None:
    model = make()
    modules = dict(model.named_modules())
    program = bg.capture(model, (torch.randn(2, 4),))
    assert name in program.parameters
    assert dict(model.named_modules()) == modules


def test_peft_models_are_looked_through() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Plain(), peft.LoraConfig(r=2, target_modules=["linear"]))
    program = bg.capture(model, (torch.randn(2, 4),))
    assert "linear.lora_A.default.weight" in program.parameters
    assert "linear.base_layer.weight" in program.frozen


def test_a_prompt_in_a_wrapper_is_told() -> None:
    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = Plain()
            config = type("Config", (), {"is_prompt_learning": True, "peft_type": "PROMPT_TUNING"})()
            self.peft_config = {"default": config}

        def get_base_model(self) -> nn.Module:
            return self.base

    with pytest.raises(CaptureError, match=r"'default' .PROMPT_TUNING. lives in the wrapper.*SoftPrompt"):
        bg.capture(Prompted(), (torch.randn(2, 4),))


class Collects(Plain):
    """Takes everything in `**kwargs`."""

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """f[B, 4] -> f[B, 4]."""
        return super().forward(x, **kwargs)


class Star(Plain):
    """Takes everything in `*inputs`."""

    def forward(self, *inputs: Any, double: bool = False) -> torch.Tensor:
        """f[B, 4] -> f[B, 4]."""
        return super().forward(*inputs, double=double)


class First(Plain):
    """Takes its input by position only."""

    def forward(self, x: torch.Tensor, /, bias: torch.Tensor | None = None) -> torch.Tensor:
        """f[B, 4] -> f[B, 4]."""
        return super().forward(x, bias)


X, BIAS = torch.linspace(-1, 1, 8).view(2, 4), torch.linspace(0, 1, 8).view(2, 4)


@pytest.mark.parametrize(
    ("model", "example", "names"),
    [
        (Collects(), {"x": X, "bias": BIAS}, ["x", "bias"]),
        (Collects(), {"x": X, "double": True}, ["x"]),
        (Collects(), {"bias": BIAS, "double": True, "x": X}, ["bias", "x"]),
        (Collects(), {"x": X, "bias": None}, ["x"]),
        (Star(), (X, BIAS), ["inputs_0", "inputs_1"]),
        (Star(), {"inputs_0": X, "inputs_1": BIAS, "double": True}, ["inputs_0", "inputs_1"]),
        (First(), (X, BIAS), ["x", "bias"]),
    ],
)
def test_forward_may_collect_its_inputs(model: nn.Module, example: Any, names: list[str]) -> None:
    program = bg.capture(model, example)
    assert [spec.name for spec in program.inputs] == names
    assert [spec.shape for spec in program.inputs] == [("batch", 4)] * len(names)
    batch = {name: torch.randn(5, 4) for name in names}
    double = isinstance(example, dict) and example.get("double", False)
    first, *second = (batch[name] for name in sorted(names, key=lambda name: name == "bias"))
    expected = Plain.forward(model, first, *second, double=double)  # type: ignore[arg-type]
    assert relative_error(program(**batch)["output"], expected) < 1e-6


def test_a_failed_capture_is_one_message() -> None:
    class Branch(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            """f[B, 4] -> f[B, 4]."""
            return self.linear(x) if x.sum() > 0 else x

    with pytest.raises(CaptureError) as caught:
        bg.capture(Branch(), (X,))
    assert "\n" not in str(caught.value)
    assert "".join(traceback.format_exception(caught.value)).count("Error: ") == 1


def test_what_is_no_tensor_in_the_output_is_told() -> None:
    class Cache:
        pass

    class Caches(Plain):
        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            """f[B, 4] -> f[B, 4] and a cache."""
            return self.linear(x), Cache()

    with pytest.raises(CaptureError, match=r"forward returns a .*Cache, which holds no plain tensors"):
        bg.capture(Caches(), (X,))


def test_distributed_models_are_looked_through(tmp_path: Path) -> None:
    """On one rank of gloo; training and running the wrapper afterwards works as before."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Plain())
        x = torch.randn(2, 4)
        engine = bg.compile(model, example=(x,), backend="torch")
        assert relative_error(engine(x=x)["output"], model(x)) < 1e-6
        assert set(bg.capture(model, (x,)).parameters) == {"linear.weight", "linear.bias"}
        model(x).sum().backward()
        assert model.module.linear.weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()
