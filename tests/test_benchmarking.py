"""Benchmarks leave models as they were, and wait for a GPU's work."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg


def test_models_get_their_modes_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    model.train()
    model[2].eval()
    seen: list[bool] = []
    model[1].register_forward_hook(lambda module, args, result: seen.append(module.training))
    bg.benchmark({"eager": model}, {"input": torch.randn(3, 4)}, runs=1, warmup=0, pause=0)
    assert seen == [False]
    assert [module.training for module in model.modules()] == [True, True, True, False]


def test_a_failing_model_gets_its_mode_back() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(RuntimeError):
        bg.benchmark({"eager": model}, {"input": torch.randn(3, 5)}, runs=1, warmup=0, pause=0)
    assert model.training


def test_a_run_ends_when_the_gpu_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("finish"))
    bg.benchmark({"f": lambda: order.append("run")}, {}, runs=1, warmup=0, pause=0)
    assert order == ["finish", "run", "finish"]
