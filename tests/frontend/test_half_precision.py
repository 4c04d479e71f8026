"""Models in half precision: captured as they round, and no more than that."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import CaptureError
from bmgraph.frontend import import_exported
from bmgraph.frontend.half_precision import in_fp32, rounding_bounds
from bmgraph.ir.program import Program

HALF = [torch.bfloat16, torch.float16]


class Attention(nn.Module):
    """Attention that is written out: its program has one node for it, which rounds in other places."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x f[B, S, 8] -> f[B, 2, S, 4]."""
        q, k, v = self.p(x).view(x.shape[0], x.shape[1], 2, 12).transpose(1, 2).chunk(3, -1)
        return torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1) @ v


@pytest.mark.parametrize("dtype", HALF)
def test_other_kernels_may_round_elsewhere(dtype: torch.dtype) -> None:
    program = bg.capture(Attention().to(dtype), {"x": torch.randn(2, 5, 8, dtype=dtype)})
    assert "scaled_dot_product_attention" in str(program)
    assert not program.training


@pytest.mark.parametrize("dtype", HALF)
def test_a_wrong_program_is_still_seen(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    canonicalize = import_exported.canonicalize

    def wrong(program: Program) -> None:
        canonicalize(program)
        for node in program.graph.nodes:
            if node.target is torch.ops.aten.scaled_dot_product_attention.default:
                node.update_kwarg("scale", 0.4)  # for 0.5

    monkeypatch.setattr(import_exported, "canonicalize", wrong)
    with pytest.raises(CaptureError, match="differs from eager"):
        bg.capture(Attention().to(dtype), {"x": torch.randn(2, 5, 8, dtype=dtype)})


def test_the_bound_is_measured_against_fp32() -> None:
    model, x = Attention(), torch.randn(2, 5, 8)

    def bounds(model: nn.Module, x: torch.Tensor) -> list[float]:
        with torch.no_grad():
            return rounding_bounds(model, {"x": x}, [model(x)], lambda batch: [model(**batch)], 1e-4)

    assert bounds(model, x) == [1e-4]
    assert 1e-3 < bounds(model.half(), x.half())[0] < 5e-3
    assert 1e-2 < bounds(model.bfloat16(), x.bfloat16())[0] < 5e-2


def test_weights_are_back_after_the_run_in_fp32() -> None:
    model = nn.Linear(3, 3, dtype=torch.bfloat16)
    weight, before = model.weight, model.weight.detach().clone()
    address, weight.grad = weight.data_ptr(), torch.ones(3, 3, dtype=torch.bfloat16)
    gradient = weight.grad
    with in_fp32(model):
        assert model.weight.dtype == torch.float32
        model(torch.randn(2, 3)).sum().backward()
    assert model.weight is weight
    assert weight.data_ptr() == address
    assert torch.equal(weight, before)
    assert weight.grad is gradient
    assert torch.equal(gradient, torch.ones(3, 3, dtype=torch.bfloat16))
