"""Fit: the passes that keep outputs best within a budget of bytes or time, what the history says, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.backends.auto import times
from bmgraph.errors import InputError, PassError, ResourceError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.observers import Timing
from bmgraph.pass_manager.pass_spec import parse_alternatives, parse_passes
from bmgraph.passes import Fit, Quantize, Shrink, known_passes
from bmgraph.passes.fit.alternatives import alternatives_of, combinations
from bmgraph.passes.fit.budget import Budget, size_up
from bmgraph.passes.fit.plan import FitPlan
from bmgraph.verify.metrics import drift

INT8, INT4, SHRINK = (
    "quantize{scheme=int8,activations=none}",
    "quantize{scheme=int4,activations=none}",
    "shrink{ffn=0.25|0.5}",
)
OVER = (SHRINK, "quantize{scheme=int8|int4,activations=none}")


class Two(nn.Module):
    """Two feed-forwards, of which the second has neurons that do little."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)) for _ in range(2)
        )
        with torch.no_grad():
            for block in self.blocks:
                block[2].weight[:, 150:] *= 0.02
                block[0].weight[150:] *= 0.02

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


BATCHES = [{"x": torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]


@pytest.fixture(scope="module")
def two() -> Program:
    return bg.capture(Two(), BATCHES[0])


def fit(program: Program, size: int | str, over: tuple[str, ...] = OVER, **options: int) -> Program:
    given = size if isinstance(size, str) else f"{size}B"
    return bg.Pipeline([Fit(bytes=given, over=over, **options)]).run(program, calibration=BATCHES)


def weights(program: Program) -> int:
    return sum(value.nbytes for value in program.parameters.values())


def moved(program: Program, after: Program) -> float:
    """The root of the mean square of drifts over the batches, by the definition."""
    squares = [drift(after(**batch), program(**batch)).error ** 2 for batch in BATCHES]
    return float((sum(squares) / len(squares)) ** 0.5)


@pytest.fixture(scope="module")
def curve(two: Program) -> FitPlan:
    return bg.plan(two, [Fit(bytes="1KB", over=OVER)], backend=Torch(), calibration=BATCHES)


def test_the_curve_is_what_each_combination_gives(two: Program, curve: FitPlan) -> None:
    for item in curve.candidates:
        passes = parse_passes(",".join(item.passes), known_passes())
        done = bg.Pipeline(passes).run(two, calibration=BATCHES)
        assert item.bytes == item.weights == weights(done)
        assert item.flops == (done.history[-1].after.flops if passes else 4 * 8 * 2 * 64 * 256)  # type: ignore[union-attr]
        assert item.drift == pytest.approx(moved(two, done), abs=1e-6)
    drifts = [item.drift for item in curve.front]
    assert drifts == sorted(drifts)
    for item in curve.candidates:
        assert any(other.bytes <= item.bytes and other.drift <= item.drift for other in curve.front)


def test_the_chosen_passes_are_recorded_and_replayed(two: Program, tmp_path: Path) -> None:
    small = fit(two, 50_000)
    assert [record.text for record in small.history] == [
        "shrink{ffn=0.25}",
        "quantize@4{scheme=int4,activations=none}",
    ] or [record.text for record in small.history] == ["quantize@4{scheme=int4,activations=none}"]
    assert all(record.chosen_by.startswith('fit{bytes="50000B"') for record in small.history)
    small.save(tmp_path / "small")
    again = bg.replay(tmp_path / "small", Two(), calibration=BATCHES)
    assert [record.text for record in again.history] == [record.text for record in small.history]
    assert all(record.chosen_by == "" for record in again.history)  # it did not search
    assert all(torch.equal(value, small.parameters[name]) for name, value in again.parameters.items())


@pytest.mark.slow
def test_no_combination_that_fits_drifts_less(two: Program) -> None:
    """Every pair and each alone, run by hand: for each size the best is found without running all of them."""
    made = []
    for shrink in ([], [Shrink(ffn=0.25)], [Shrink(ffn=0.5)]):
        for scheme in ("", "int8", "int4"):
            passes = [*shrink, *([Quantize(scheme, activations="none")] if scheme else [])]
            made.append(bg.Pipeline(passes).run(two, calibration=BATCHES))
    for size in sorted(map(weights, made)):
        best = min(moved(two, done) for done in made if weights(done) <= size)
        small = fit(two, size)
        assert weights(small) <= size
        assert moved(two, small) == pytest.approx(best, rel=1e-3)


def test_a_program_that_fits_is_left_as_it_is(two: Program) -> None:
    small = fit(two, weights(two))
    assert small.history == ()
    assert str(small) == str(two)


def test_a_budget_that_cannot_be_met_names_the_nearest_that_can(two: Program) -> None:
    with pytest.raises(
        PassError,
        match=r"bytes=10KB cannot be met by these passes on torch: the nearest is (\S+), shrink\{ffn=0\.5\},quantize\{scheme=int4.*\} "
        r"\(drift 0\.\d+\); give bytes=\1, or passes in over= that save more",
    ) as caught:
        fit(two, "10KB")
    nearest = str(caught.value).split("; give bytes=")[1].split(",")[0]
    assert [record.text.partition("{")[0] for record in fit(two, nearest).history] == ["shrink", "quantize@4"]


def test_few_tries_tell_what_was_left(two: Program) -> None:
    with pytest.raises(
        PassError, match="4 combinations were not tried: tries= combinations have run: raise it"
    ):
        fit(two, "10KB", tries=4)
    with pytest.raises(InputError, match="tries=3: over= has 4 alternatives, and each is tried alone"):
        Fit(bytes="10KB", over=OVER, tries=3)


def test_what_contracts_exclude_are_alternatives(two: Program) -> None:
    small = fit(two, 50_000, (INT8, INT4))
    assert [record.text for record in small.history] == ["quantize@4{scheme=int4,activations=none}"]
    with pytest.raises(
        PassError,
        match=r"none of the passes in over= can stand here: .* cannot run on a program that is quantized",
    ):
        bg.Pipeline([Fit(bytes="40KB", over=(INT8,)), Quantize("int8")]).run(two, calibration=BATCHES)


def test_passes_of_one_text_go_together(two: Program) -> None:
    small = fit(two, 60_000, (f"shrink{{ffn=0.25}},{INT8}",))
    assert [record.text.partition("{")[0] for record in small.history] == ["shrink", "quantize@4"]


def test_what_is_stopped_is_refused_and_the_next_is_taken(two: Program) -> None:
    """int8 in groups of what no kernel has stands for a pass that raises; a bound on drift for one that is stopped."""
    done = bg.Pipeline([Fit(bytes="60KB", over=OVER)]).run(two, calibration=BATCHES, max_drift=0.05)
    assert all(record.drift is not None and record.drift <= 0.05 for record in done.history)
    with pytest.raises(
        PassError,
        match=r"cannot run, such as .*: pass quantize.* was stopped: the outputs drifted by .* \(max_drift\)",
    ):
        bg.Pipeline([Fit(bytes="10KB", over=(INT8, INT4))]).run(two, calibration=BATCHES, max_drift=1e-4)


def test_training_recovers_what_was_lost(two: Program) -> None:
    over = ("shrink{ffn=0.5}", "distill{on=outputs,steps=30}")
    resources = {"teacher": two, "text": BATCHES, "trainer": Torch(optimizer=AdamW(lr=1e-3))}
    small = bg.Pipeline([Fit(bytes="140KB", over=over)]).run(two, calibration=BATCHES, resources=resources)
    assert [record.text.partition("{")[0] for record in small.history] == ["shrink", "distill"]
    plain = bg.Pipeline([Shrink(ffn=0.5)]).run(two)
    assert moved(two, small) < moved(two, plain)
    with pytest.raises(ResourceError, match="needs the resource 'teacher'"):
        bg.Pipeline([Fit(bytes="140KB", over=over)]).run(two, calibration=BATCHES)


def test_observers_hear_of_the_chosen_passes_alone(two: Program) -> None:
    heard = Timing()
    bg.Pipeline([Fit(bytes="60KB", over=OVER)], observers=[heard]).run(two, calibration=BATCHES)
    assert [text for text, _ in heard.seconds] == ["quantize{activations=none}"] or len(heard.seconds) == 2


@pytest.fixture
def short_races(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "FEWEST", 2)
    monkeypatch.setattr(times, "MOST", 2)


def test_bytes_are_those_of_the_engine(two: Program) -> None:
    pytest.importorskip("onnxruntime")
    asked = Fit(bytes="100KB", over=(INT8,))
    plan = bg.plan(two, [asked], backend="onnx", calibration=BATCHES)
    engine = bg.compile(two, [asked], backend="onnx", calibration=BATCHES)
    assert plan.chosen is not None
    assert plan.chosen.files == engine.report.bytes
    assert engine.report.bytes is not None
    assert weights(two) / 4 < engine.report.bytes <= 100_000
    assert [re.sub("@[0-9]+", "", item.text) for item in engine.report.records if not item.within] == list(
        plan.chosen.passes
    )
    assert "plan for onnx" in str(engine.report)
    assert "chosen" in str(plan)


def test_a_latency_is_measured_on_engines(two: Program, short_races: None) -> None:
    engine = bg.compile(two, [Fit(latency="10s", over=OVER)], backend=Torch(), calibration=BATCHES)
    assert engine.report.records == ()
    with pytest.raises(
        PassError,
        match=r"latency=1e-06ms cannot be met .* on torch: the nearest is \S+ and \S+ ms, .*; give latency=",
    ):
        bg.compile(two, [Fit(latency="0.001us", over=(INT8,))], backend=Torch(), calibration=BATCHES)
    with pytest.raises(
        PassError, match=r"latency= is measured on an engine: give the pass to bg.compile or bg.plan"
    ):
        bg.Pipeline([Fit(latency="10s", over=OVER)]).run(two, calibration=BATCHES)


def test_bad_options_are_refused() -> None:
    for options, said in (
        ({"over": OVER}, "a budget is missing: give bytes='60MB', latency='20ms', or both"),
        ({"bytes": "60"}, "bytes='60': give a size above 0, such as '60MB'"),
        ({"bytes": "0MB"}, "bytes='0MB': give a size above 0"),
        ({"latency": "20"}, "latency='20': give a time above 0, such as '20ms'"),
        ({"bytes": "60MB", "over": ()}, r"over=\(\): give texts of passes"),
        ({"bytes": "60MB", "over": (3,)}, r"over=\(3,\): give texts of passes"),
        ({"bytes": "60MB", "over": ("",)}, r"over\[0\]='' names no pass"),
        ({"bytes": "60MB", "over": ("quantise{}",)}, "no pass is called 'quantise'; did you mean 'quantize'"),
        ({"bytes": "60MB", "over": ("zero{stage=1}",)}, r"over\[0\]: zero.* is of the step stage"),
        ({"bytes": "60MB", "over": (str(Fit(bytes="1MB", over=(INT8,))),)}, "a search within a search"),
    ):
        with pytest.raises(InputError, match=said):
            Fit(**{"over": OVER, **options})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="or a Fit among the passes: there is nothing else to plan"):
        bg.plan(nn.Linear(2, 2), [], example=(torch.randn(1, 2),), backend="onnx")


def test_budgets_and_texts() -> None:
    assert Budget.of("1.5MiB", "") == Budget(1572864, None)
    assert Budget.of("", "800us") == Budget(None, 0.8)
    assert Budget.of("1GB", "1.5 s") == Budget(10**9, 1500.0)
    for size in (7, 999, 1000, 20_001, 999_999, 14_622_005, 91_433_883):
        assert Budget.of(size_up(size), "").used(size, None) <= 1
    assert Fit(bytes="1MB", over=[Quantize("int4"), "shrink{ffn=0.5}"]).over == (  # type: ignore[arg-type]
        "quantize{scheme=int4}",
        "shrink{ffn=0.5}",
    )
    item = Fit(bytes="60MB", over=OVER, tries=5)
    assert parse_passes(str(item), known_passes()) == [item]
    known = known_passes()
    assert [list(map(str, found)) for found in parse_alternatives("shrink{ffn=0.25|0.5},cast", known)] == [
        ["shrink{ffn=0.25}", "cast"],
        ["shrink{ffn=0.5}", "cast"],
    ]
    with pytest.raises(
        InputError, match="shrink is given 2 values of 'ffn': only a pass that chooses takes several"
    ):
        parse_passes(SHRINK, known)
    found = alternatives_of(OVER, known)
    keys = combinations(found, lambda passes: True)
    assert len(keys) == 3 * 3 - 1
    assert len(set(keys)) == 8
    assert keys[:3] == [(0,), (0, 2), (0, 3)]
