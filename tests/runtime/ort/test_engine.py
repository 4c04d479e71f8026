"""The ONNX engine: outputs equal its program, input checks, provenance of nodes, saving and loading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import bmgraph as bg
from bmgraph.backends import Onnx
from bmgraph.errors import BackendError, InputError, VerificationError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.report import Report
from bmgraph.passes import LoRA, Quantize
from bmgraph.runtime.engine_base import Engine
from bmgraph.runtime.engine_check import check_engine
from bmgraph.runtime.ort.engine import OrtEngine
from bmgraph.runtime.ort.profile import profile
from bmgraph.verify.metrics import relative_error
from tests.helpers.models import TinyEncoder, tokens


@pytest.fixture(scope="module")
def engine(program: Program) -> OrtEngine:
    return bg.compile(program, passes=[], backend="onnx")


@pytest.fixture(scope="module")
def small(program: Program, batches: list[dict[str, torch.Tensor]]) -> OrtEngine:
    return bg.compile(program, passes=[Quantize("int8")], backend="onnx", calibration=batches)


def test_an_engine_equals_its_program_at_other_sizes(engine: OrtEngine, program: Program) -> None:
    for batch in (tokens(1, 3), tokens(4, 12)):
        found, expected = engine(**batch), program(**batch)
        assert list(found) == list(expected)
        real = batch["attention_mask"].bool()
        for name in found:
            assert relative_error(found[name][real], expected[name][real]) < 1e-5
    assert engine.report.engine_drift is not None
    assert engine.report.engine_drift < 1e-5


def test_the_plain_export_is_equal_too(program: Program) -> None:
    plain = bg.compile(program, passes=[], backend=Onnx(optimise=False))
    assert plain.report.engine_drift is not None
    assert plain.report.engine_drift < 1e-5


def test_the_plain_export_is_gone(engine: OrtEngine) -> None:
    operators = [
        node.op_type
        for node in onnx.load(str(engine.folder / "model.onnx"), load_external_data=False).graph.node
    ]
    assert operators.count("MultiHeadAttention") == 2
    for junk in ("Where", "IsNaN", "Softmax", "Transpose", "Reshape", "If"):
        assert junk not in operators


def test_an_int8_engine_multiplies_integers(small: OrtEngine) -> None:
    operators = [
        node.op_type
        for node in onnx.load(str(small.folder / "model.onnx"), load_external_data=False).graph.node
    ]
    assert operators.count("MatMulIntegerToFloat") == 13
    assert "DequantizeLinear" not in operators
    assert "MatMul" not in operators


def test_every_node_knows_its_site_and_pass(small: OrtEngine) -> None:
    for node in onnx.load(str(small.folder / "model.onnx"), load_external_data=False).graph.node:
        origin = {item.key: item.value for item in node.metadata_props}
        assert origin.get("bmgraph.site") is not None, node.name
        assert origin.get("bmgraph.pass"), node.name
        if node.op_type == "MatMulIntegerToFloat":
            assert origin["bmgraph.pass"] == "quantize"
            assert origin["bmgraph.site"].endswith(".weight")


def test_a_row_does_not_see_its_neighbours(small: OrtEngine) -> None:
    batch, others = tokens(4, 9, 1), tokens(4, 9, 2)
    alone = small(**batch)
    beside = small(**{name: torch.cat([value[:1], others[name][1:]]) for name, value in batch.items()})
    for name in alone:
        assert torch.equal(alone[name][0], beside[name][0])


def test_small_outputs_and_bound_ones_are_the_same(
    engine: OrtEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = tokens(3, 5)
    small = engine(**batch)
    monkeypatch.setattr("bmgraph.runtime.ort.engine.SMALL", 0)
    bound = engine(**batch)
    for name in small:
        assert torch.equal(small[name], bound[name])


def test_numpy_goes_in_too(engine: OrtEngine) -> None:
    batch = tokens(2, 4)
    found = engine(**{name: value.numpy() for name, value in batch.items()})
    assert torch.equal(found["logits"], engine(**batch)["logits"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.zeros((3, 8), np.float32)}, "dtype float32: expected int64"),
        ({"ids": torch.zeros(3, 8, 1, dtype=torch.long)}, r"has shape \[3, 8, 1\]"),
        ({"attention_mask": None}, "missing input 'attention_mask'"),
        ({"extra": torch.zeros(1)}, "unknown input 'extra'"),
    ],
)
def test_wrong_inputs_are_refused_before_the_run(
    engine: OrtEngine, change: dict[str, object], message: str
) -> None:
    batch = {**tokens(3, 8), **change}
    with pytest.raises(InputError, match=message):
        engine(**{name: value for name, value in batch.items() if value is not None})


def test_ids_outside_the_vocabulary_are_refused(engine: OrtEngine) -> None:
    batch = tokens(2, 4)
    with pytest.raises(
        InputError, match=r"input 'ids' holds 10\d\d at \[0, 0\]: this model looks its values up in a table"
    ):
        engine(**{**batch, "ids": batch["ids"] + 1000})


def test_saved_and_loaded_it_computes_the_same_bits(small: OrtEngine, tmp_path: Path) -> None:
    small.save(tmp_path / "out")
    loaded = bg.load(tmp_path / "out")
    for name, value in small(**tokens(3, 7)).items():
        assert torch.equal(loaded(**tokens(3, 7))[name], value)
    assert [record.text for record in loaded.report.records] == [
        record.text for record in small.report.records
    ]


def test_losses_and_their_inputs_are_not_served() -> None:
    class WithLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(8, 4)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.head(x)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    program = bg.capture(WithLoss(), {"x": torch.randn(3, 8), "labels": torch.tensor([0, 1, 2])})
    assert program.losses == ("loss",)
    engine = bg.compile(program, backend="onnx")
    assert [spec.name for spec in engine.inputs] == ["x"]
    assert [spec.name for spec in engine.outputs] == ["logits"]


def test_an_operator_without_onnx_form_is_reported_with_its_location() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(self.inner(x))

    with pytest.raises(
        BackendError,
        match=r"operator aten\.special_bessel_j0\.default in .*test_engine\.py:\d+.* cannot be translated to ONNX",
    ):
        bg.compile(Odd(), example=(torch.randn(2, 3),), backend="onnx")


def test_wrong_backends_and_providers_are_refused(program: Program) -> None:
    with pytest.raises(InputError, match="no backend is called 'onyx': choose one of auto, onnx, openvino"):
        bg.compile(program, backend="onyx")
    with pytest.raises(InputError, match="provider 'Quantum' is not available"):
        bg.compile(program, backend=Onnx(providers=("Quantum",)))
    with pytest.raises(BackendError, match="meta device"):
        bg.compile(program.to("meta"), backend="onnx")
    with pytest.raises(InputError, match="needs example="):
        bg.compile(torch.nn.Linear(2, 2))


def test_time_is_grouped_by_site_and_pass(small: OrtEngine) -> None:
    spent = profile(small, tokens(4, 16), runs=3)
    assert "MatMulIntegerToFloat" in spent.by("operator")
    assert "quantize" in spent.by("made_by")
    assert any(site.endswith("up.weight") for site in spent.by("site"))


def test_a_benchmark_reports_medians_and_ratios(small: OrtEngine, model: TinyEncoder, tmp_path: Path) -> None:
    result = bg.benchmark({"eager": model, "engine": small}, tokens(), runs=3, warmup=1, pause=0)
    result.save(tmp_path / "figures.json")
    assert result.speedup("eager") == 1.0
    assert "engine" in str(result)
    with pytest.raises(InputError, match="base='none'"):
        bg.benchmark({"eager": model}, tokens(), base="none")


@pytest.mark.slow
def test_weights_over_two_gigabytes_are_compiled_and_loaded(tmp_path: Path) -> None:
    """An ONNX file is one protobuf message of at most 2 GiB: larger weights must be external data."""
    torch.manual_seed(0)
    wide = [torch.nn.Linear(8192, 8192, bias=False) for _ in range(9)]
    model = torch.nn.Sequential(*(layer for pair in zip(wide, [torch.nn.ReLU()] * 9) for layer in pair))
    x = torch.randn(3, 8192)
    engine = bg.compile(model, passes=[], example=(x,), backend="onnx")
    assert engine.report.bytes is not None
    assert engine.report.bytes > 2**31
    with torch.no_grad():
        assert relative_error(next(iter(engine(input=x).values())), model(x)) < 1e-4
    engine.save(tmp_path / "large")
    again = bg.load(tmp_path / "large")
    assert torch.equal(next(iter(again(input=x).values())), next(iter(engine(input=x).values())))


class Moved(Engine):
    """An engine whose outputs differ from its program's by a given relative error."""

    def __init__(self, program: Program, share: float) -> None:
        super().__init__(program.inputs, program.outputs, program.ranges, Report())
        self.program, self.share = program, share

    def __call__(self, **batch: object) -> dict[str, torch.Tensor]:
        return {name: value * (1 + self.share) for name, value in self.program(**self.checked(batch)).items()}

    def save(self, path: str | Path) -> None:
        raise NotImplementedError


def test_engine_tolerance_includes_earlier_rounding_whatever_pass_came_last(program: Program) -> None:
    rounded = bg.Pipeline([Quantize("int8", activations="dynamic")]).run(program)
    tuned = bg.Pipeline([LoRA()]).run(rounded)
    moved = rounded.history[-1].cumulative
    assert moved is not None
    assert moved > 2e-3
    assert tuned.history[-1].cumulative == pytest.approx(0, abs=1e-6)
    check_engine(Moved(tuned, moved), tuned, tokens(), "moved")
    for held, share in ((tuned, 2 * moved), (program, 2e-3)):
        with pytest.raises(VerificationError, match="the moved engine differs from its program in"):
            check_engine(Moved(held, share), held, tokens(), "moved")


class Ignores(torch.nn.Module):
    """Takes labels for a loss, and rewards for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(
        self, x: torch.Tensor, labels: torch.Tensor, rewards: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """x f[B, 4], labels i64[B], rewards f[B] -> loss f[], logits f[B, 3]."""
        logits = self.linear(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_an_input_that_reaches_no_output_is_accepted_and_ignored(tmp_path: Path) -> None:
    example = {"x": torch.randn(3, 4), "labels": torch.tensor([0, 1, 2]), "rewards": torch.rand(3)}
    program = bg.capture(Ignores(), example)
    engine = bg.compile(program, passes=[], backend="onnx")
    engine.save(tmp_path / "engine")
    program.save(str(tmp_path / "program"))
    loaded = bg.load(tmp_path / "engine")
    expected = program(**example)["logits"]
    for runs in (engine, loaded, bg.load(tmp_path / "program")):
        assert relative_error(runs(**example)["logits"], expected) < 1e-5
    assert [spec.name for spec in engine.inputs] == ["x"]
    assert torch.equal(loaded(x=example["x"])["logits"], engine(**example)["logits"])
    with pytest.raises(InputError, match="unknown input 'reward'"):
        loaded(x=example["x"], reward=example["rewards"])
