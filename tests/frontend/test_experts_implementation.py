"""Mixtures of experts as `transformers` loads them: captured without any preparation, and left as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

import bmgraph as bg
from bmgraph.errors import CaptureError
from bmgraph.verify.metrics import relative_error

IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm", None)


@use_experts_implementation
class Experts(nn.Module):
    """Experts 4, hidden 8, features 8 (a kernel of torch wants multiples of 16 bytes); `forward` is the loop over experts that a config without a choice runs."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.num_experts, self.act_fn = 4, F.silu
        self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 8))
        self.down_proj = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(rows)
        for expert in ids.unique().tolist():
            tokens, place = torch.where(ids == expert)
            entered = self._apply_gate(F.linear(rows[tokens], self.gate_up_proj[expert]))
            leaving = F.linear(entered, self.down_proj[expert]) * weights[tokens, place, None]
            result.index_add_(0, tokens, leaving)
        return result


class Mixture(nn.Module):
    def __init__(self, implementation: str | None, fails: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = PreTrainedConfig()
        config._experts_implementation_internal = implementation
        self.router, self.experts, self.fails = nn.Linear(8, 4), Experts(config), fails

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        result = self.experts(x, ids, weights)
        if self.fails and torch.compiler.is_exporting():
            raise ValueError("no export")
        return result


def _chosen(model: Mixture) -> str | None:
    return model.experts.config._experts_implementation  # type: ignore[no-any-return]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_captured_as_loaded(implementation: str | None) -> None:
    model = Mixture(implementation)
    program = bg.capture(model, {"x": torch.randn(5, 8)})
    assert _chosen(model) == implementation
    assert len(program.structure().experts) == 1
    batch = torch.randn(9, 8)
    with torch.no_grad():
        assert relative_error(program(x=batch)["output"], model(batch)) < 1e-5


def test_restored_after_an_error() -> None:
    model = Mixture("grouped_mm", fails=True)
    with pytest.raises(CaptureError, match="no export"):
        bg.capture(model, {"x": torch.randn(5, 8)})
    assert _chosen(model) == "grouped_mm"


def test_proven_against_the_implementation_that_the_user_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation of the user's own that computes something else is never replaced without a word."""

    def doubled(*inputs: torch.Tensor) -> torch.Tensor:
        return 2 * ALL_EXPERTS_FUNCTIONS["batched_mm"](*inputs)  # type: ignore[no-any-return]

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "doubled", doubled)
    with pytest.raises(CaptureError, match="differs from eager"):
        bg.capture(Mixture("doubled"), {"x": torch.randn(5, 8)})
