"""Benchmarks leave models as they were, and wait for a GPU's work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.passes import Quantize


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


class Method(nn.Module):
    """Two methods, one of which feeds the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(4, 3), nn.Linear(3, 2)
        self.calls: list[str] = []

    def encode(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls.append("encode")
        return {"memory": self.one(x)}

    def forward(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls.append("forward")
        return {"scores": self.other(memory)}


def test_each_graph_is_timed_or_all_that_the_batch_asks_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = Method()
    given = {"encode": {"x": torch.randn(5, 4)}, "forward": {"memory": torch.randn(5, 3)}}
    program = bg.capture_methods(model, given)
    ran: list[str] = []
    call = Program.__call__

    def counted(self: Program, **batch: object) -> dict[str, torch.Tensor]:
        ran.append(self.entry)
        return call(self, **batch)

    monkeypatch.setattr(Program, "__call__", counted)
    batch = {"x": torch.randn(6, 4)}

    def timed(contestants: Any, **options: Any) -> bg.benchmarking.Comparison:
        ran.clear()
        model.calls.clear()
        return bg.benchmark(contestants, batch, runs=2, warmup=0, pause=0, **options)

    timed({"program": program})
    assert ran == ["forward", "encode"] * 2
    both = {"eager": model, "program": program}
    assert timed(both, graph="encode").batch == "graph encode: x [6, 4]"
    assert (ran, model.calls) == (["encode"] * 2, ["encode"] * 2)
    timed(both, graph="forward")  # what it reads of the other graph is computed once
    assert (ran, model.calls) == (["encode", "forward", "forward"], ["forward"] * 2)
    with pytest.raises(InputError, match="no graph is called 'decode': the program has"):
        timed({"program": program}, graph="decode")
    with pytest.raises(InputError, match="Method has no method 'decode'"):
        timed({"eager": model}, graph="decode")

    done = bg.Pipeline([Quantize("int8", activations="none", smallest=1)]).run(program)
    done.save(str(tmp_path / "saved"))
    again = bg.replay(tmp_path / "saved", model)  # of all its methods, with the examples that were saved
    assert list(again.graphs) == list(done.graphs)
    assert all(torch.equal(again.parameters[name], done.parameters[name]) for name in done.parameters)
    assert list(bg.replay(tmp_path / "saved", model, examples=given).graphs) == list(done.graphs)
    engine = bg.compile(done, backend="torch")
    assert timed({"engine": engine}, graph="encode").batch == "graph encode: x [6, 4]"
    with pytest.raises(InputError, match="no graph is called 'decode': the engine has forward, encode"):
        timed({"engine": engine}, graph="decode")
    bg.compile(done, backend="onnx").save(str(tmp_path / "engine"))
    with pytest.raises(
        InputError, match=r"methods forward and encode, and holds no example of 'encode': give examples="
    ):
        bg.replay(tmp_path / "engine", model)
    assert list(bg.replay(tmp_path / "engine", model, examples=given).graphs) == list(done.graphs)
