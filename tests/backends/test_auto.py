"""backend="auto": the fastest engine of those that are installed, and what the report says of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import Auto, Onnx, OpenVINO, Torch
from bmgraph.backends.auto import times as module
from bmgraph.backends.auto.generation_trial import generations
from bmgraph.backends.auto.race import race
from bmgraph.benchmarking import Comparison
from bmgraph.errors import BackendError, InputError, PassError
from bmgraph.pass_manager.report import Report
from bmgraph.passes import KVCache, Quantize
from bmgraph.runtime.engine_base import Engine
from tests.helpers.models import tiny_decoder, tokens
from tests.helpers.openvino import needs_openvino

needs_openvino()


class Timed(Engine):
    """An engine that gives nothing; `unable` says why it cannot run."""

    unable = ""

    def __init__(self, unable: str = "") -> None:
        super().__init__((), (), {}, Report(), example={"x": torch.zeros(1)})
        self.unable = unable  # type: ignore[misc]

    def __call__(self, **batch: object) -> dict[str, torch.Tensor]:
        return {}

    def save(self, path: object) -> None:
        raise NotImplementedError


def measured(milliseconds: Mapping[str, float]) -> Callable[..., Comparison]:
    """A benchmark that says these times."""

    def benchmark(engines: Mapping[str, Engine], batch: Any, runs: int, warmup: int) -> Comparison:
        return Comparison(
            next(iter(engines)), {name: [milliseconds[name]] * runs for name in engines}, "x [1]", {}
        )

    return benchmark


def refusing(error: Exception) -> Callable[[], Engine]:
    def build() -> Engine:
        raise error

    return build


def test_the_fastest_is_kept_and_the_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "benchmark", measured({"a": 4.0, "b": 2.0, "c": 3.0}))
    engines = {name: Timed() for name in "abc"}
    kept = race(
        {
            **{name: (lambda name=name: engines[name]) for name in "abc"},
            "d": refusing(PassError("d takes no such pass")),
            "e": lambda: Timed("there is no GPU"),
        }
    )
    assert kept is engines["b"]
    assert kept.report.notes == [
        "auto: b is 2.00 times as fast as a (2.00 against 4.00 ms, medians of 41 runs in turn on x [1])",
        "auto: b is 1.50 times as fast as c (2.00 against 3.00 ms, medians of 41 runs in turn on x [1])",
        "auto: d is left out: d takes no such pass",
        "auto: e is left out: there is no GPU",
    ]


def test_where_nothing_is_built_all_reasons_are_told() -> None:
    with pytest.raises(BackendError, match="no backend builds an engine of this program: a: one; b: two"):
        race({"a": refusing(PassError("one")), "b": refusing(BackendError("two"))})
    with pytest.raises(PassError, match=r"^one$"):
        race({"a": refusing(PassError("one"))})
    with pytest.raises(RuntimeError, match="ours"):  # an error that is not the user's is not hidden
        race({"a": refusing(RuntimeError("ours"))})


@pytest.mark.skipif(torch.cuda.is_available(), reason="TensorRT may win")
@pytest.mark.parametrize("rounds", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_target_gets_its_own_program_and_one_engine_is_kept(rounds: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
    x = torch.randn(4, 32)
    once = iter([{"input": x}])  # may be read once
    passes = [Quantize("int8")] if rounds else []
    engine = bg.compile(model, passes, example=(x,), backend="auto", calibration=once, max_drift=0.2)
    other = {"onnx": "openvino", "openvino": "onnx"}[engine.report.backend]
    assert not rounds or engine.report.records[-1].target.partition("@")[0] == engine.report.backend
    said = " ".join(engine.report.notes)
    assert f"auto: {engine.report.backend} is" in said
    assert f"times as fast as {other}" in said
    assert "auto: tensorrt is left out: " in said
    assert next(iter(engine.report.seconds)) == "capture"


def test_what_generates_is_timed_while_it_does() -> None:
    """Tokens decide, not the time of a call: an engine that only scores fast is not taken."""
    program = bg.Pipeline([KVCache()]).run(bg.capture(tiny_decoder(), tokens()))
    slow, fast = (bg.compile(program, backend=config) for config in (Torch(), Onnx(threads=1)))
    asked = generations({"a": slow, "b": fast})
    assert asked is not None
    calls, batch, new = asked
    assert new == 32
    assert list(calls) == ["a", "b"]
    assert {name: list(value.shape) for name, value in batch.items()} == {"32 new tokens behind": [3, 8]}
    assert calls["a"]() == calls["b"]()
    assert slow.speed.new_tokens == fast.speed.new_tokens == 3 * 31
    assert generations({"a": slow, "b": Timed()}) is None


def test_each_target_that_generates_is_tried() -> None:
    tried = []

    def lower(config: Any) -> Engine:
        tried.append(config)
        return Timed()

    Auto(generate=True).choose(lower)
    assert tried == [Onnx(generate=True), OpenVINO(generate=True)]


def test_names_are_checked() -> None:
    for among, message in (
        ((), "give one name or more"),
        (("onnx", "onnx"), "each once"),
        (("auto",), "'auto' is none of onnx"),
    ):
        with pytest.raises(InputError, match=message):
            Auto(among=among)
