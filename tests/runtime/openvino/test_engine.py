"""OpenVINO engines: outputs equal their program, bits depend on the inputs alone, precision, input checks, saving and loading."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import bmgraph as bg
from bmgraph.backends import OpenVINO
from bmgraph.errors import BackendError, BundleError, InputError, VerificationError
from bmgraph.ir.program import Program
from bmgraph.passes import Deltas, Quantize
from bmgraph.runtime.arrays import feeds_of
from bmgraph.runtime.engine_check import check_engine
from bmgraph.runtime.openvino import bundle, compiled, compiled_model, library
from bmgraph.runtime.openvino.compiled import CompiledModels
from bmgraph.runtime.openvino.compiled_model import CompiledModel
from bmgraph.runtime.openvino.engine import OpenVinoEngine
from bmgraph.verify.metrics import relative_error
from tests.helpers.bundles import edit_json, sign
from tests.helpers.models import TinyEncoder, tokens
from tests.helpers.openvino import needs_openvino
from tests.helpers.paths import ROOT
from tests.passes.deltas.test_rows_choose import NAMES, PAIRS, ROWS, by_rows, feedforward, saved

needs_openvino()

Batches = list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def engine(program: Program) -> OpenVinoEngine:
    return bg.compile(program, passes=[], backend=OpenVINO())


@pytest.fixture(scope="module")
def small(program: Program, batches: Batches) -> OpenVinoEngine:
    return bg.compile(program, passes=[Quantize("int8")], backend=OpenVINO(), calibration=batches)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_an_engine_equals_its_program_at_other_sizes(engine: OpenVinoEngine, program: Program) -> None:
    for batch in (tokens(1, 3), tokens(4, 12)):
        found, expected = engine(**batch), program(**batch)
        assert list(found) == list(expected)
        real = batch["attention_mask"].bool()
        for name in found:
            assert relative_error(found[name][real], expected[name][real]) < 1e-5
    assert engine.report.engine_drift is not None
    assert engine.report.engine_drift < 1e-5
    assert "computes float32 in f32" in str(engine.report)


def test_rounded_activations_run_in_integers(small: OpenVinoEngine, program: Program) -> None:
    model = small.models.at(tuple(tuple(tokens()[spec.name].shape) for spec in small.inputs))
    kinds = [
        node.get_rt_info()["runtimePrecision"].astype(str)
        for node in model.runtime_model().get_ops()
        if node.get_rt_info()["layerType"].astype(str) == "FullyConnected"
    ]
    assert kinds == ["u8"] * 13
    assert small.precision is (torch.bfloat16 if library.has_bf16() else torch.float32)
    assert small.report.total_drift is not None
    assert 1e-4 < small.report.total_drift < 0.1


def test_a_row_does_not_see_its_neighbours(small: OpenVinoEngine) -> None:
    batch, others = tokens(4, 9, 1), tokens(4, 9, 2)
    alone = small(**batch)
    beside = small(**{name: torch.cat([value[:1], others[name][1:]]) for name, value in batch.items()})
    for name in alone:
        assert torch.equal(alone[name][0], beside[name][0])


def test_bits_do_not_depend_on_what_ran_before(
    program: Program, small: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models for the shapes that were used last are kept; one that was dropped is compiled again, to the same bits."""
    wanted = {length: small(**tokens(2, length)) for length in (5, 6, 7)}
    monkeypatch.setattr(small.models, "most", 2)
    small(**tokens(2, 4))
    assert len(small.models.shapes) == 2
    for length in (7, 5, 6, 5, 7):
        assert same(small(**tokens(2, length)), wanted[length])
        assert small.models.shapes[-1] == ((2, length), (2, length))
    assert len(small.models.shapes) == 2


def test_threads_may_call_at_once(engine: OpenVinoEngine) -> None:
    asked = [tokens(2, length, seed) for seed in range(4) for length in (3, 9)]
    wanted = [engine(**batch) for batch in asked]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(same, pool.map(lambda batch: engine(**batch), asked), wanted))


def again(engine: OpenVinoEngine, **change: Any) -> CompiledModel:
    """The engine's model for `tokens()`, compiled with other settings."""
    names = [spec.name for spec in engine.inputs]
    models = CompiledModels(engine.models.file, names, replace(engine.settings, **change), 0)
    found = models.at(tuple(tuple(tokens()[name].shape) for name in names))
    assert isinstance(found, CompiledModel)
    return found


def test_earlier_results_stay_when_the_model_writes_into_our_memory(
    engine: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_model, "SMALL", 0)
    asked = [feeds_of(engine, tokens(3, 8, seed)) for seed in range(3)]
    model = again(engine)
    found = [model.run(feeds) for feeds in asked]
    for feeds, results in zip(asked, found):
        assert all(map(np.array_equal, results, engine.run(feeds)))


def test_one_model_serves_all_shapes_where_asked(program: Program) -> None:
    engine = bg.compile(program, backend=OpenVINO(shapes="dynamic"), verify="off")
    for batch in (tokens(1, 3), tokens(4, 12)):
        real = batch["attention_mask"].bool()
        assert relative_error(engine(**batch)["logits"][real], program(**batch)["logits"][real]) < 1e-5
    assert engine.models.shapes == []
    assert "one model for all shapes: the last bits differ" in str(engine.report)


def test_bf16_is_bound_by_its_own_rounding(program: Program) -> None:
    if not library.has_bf16():
        pytest.skip("this CPU has no bf16")
    engine = bg.compile(program, backend=OpenVINO(precision="bf16"))
    assert engine.precision is torch.bfloat16
    assert engine.report.engine_drift is not None
    assert 1e-3 < engine.report.engine_drift < 3e-2
    assert "computes float32 in bf16" in str(engine.report)

    class Claims(OpenVinoEngine):
        """Says that it computes in f32, and does not."""

        precision = torch.float32  # type: ignore[assignment]

    false = Claims(engine.files, engine.inputs, engine.outputs, engine.ranges, engine.report, engine.settings)
    with pytest.raises(VerificationError, match="the openvino engine differs from its program in"):
        check_engine(false, program, tokens(), "openvino")


def test_weights_in_8_bits_leave_activations_alone() -> None:
    """By itself OpenVINO would round the activations of a product with 8-bit weights."""
    torch.manual_seed(0)
    engine = bg.compile(
        torch.nn.Linear(64, 64), [Quantize("int8", activations="none")], example=(torch.randn(9, 64),), backend="openvino",
    )  # fmt: skip
    assert engine.precision is torch.float32
    assert engine.report.engine_drift is not None
    assert engine.report.engine_drift < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(3, 8)}, "dtype float32: expected int64"),
        ({"attention_mask": None}, "missing input 'attention_mask'"),
        ({"ids": tokens(3, 8)["ids"] + 1000}, r"input 'ids' holds 10\d\d at \[\d, \d\]: this model looks its values up"),
        ({"attention_mask": tokens(3, 8)["attention_mask"] + 2**40}, "holds 1099511627777: OpenVINO computes integers exactly up to 16777216"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_refused_before_the_run(
    engine: OpenVinoEngine, change: dict[str, object], message: str
) -> None:
    batch = {**tokens(3, 8), **change}
    with pytest.raises(InputError, match=message):
        engine(**{name: value for name, value in batch.items() if value is not None})


def test_what_is_not_built_is_refused_by_name(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"precision": "f16"}, "precision='f16': choose one of auto, f32, bf16"),
        ({"shapes": "any"}, "shapes='any': choose static or dynamic"),
    ):
        with pytest.raises(InputError, match=message):
            OpenVINO(**options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="threads=0: give a number of threads"):
        bg.compile(program, backend=OpenVINO(threads=0))
    double = bg.capture(torch.nn.Linear(4, 2).double(), (torch.randn(3, 4, dtype=torch.float64),))
    with pytest.raises(BackendError, match="is in float64, which OpenVINO computes in float32"):
        bg.compile(double, backend="openvino")
    monkeypatch.setattr(library, "has_bf16", lambda: False)
    monkeypatch.setattr("bmgraph.backends.openvino.backend.has_bf16", lambda: False)
    with pytest.raises(BackendError, match="this CPU does not compute in bf16"):
        bg.compile(program, backend=OpenVINO(precision="bf16"))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r'not installed: pip install -e "\.\[openvino\]"'):
        bg.compile(program, backend="openvino")


SILENT = """
import socket, sys, threading
from concurrent import futures

told = []
socket.socket.connect = lambda *given: told.append("connect")
socket.create_connection = lambda *given, **more: told.append("connection")
socket.getaddrinfo = lambda *given, **more: told.append("name")
futures.ThreadPoolExecutor.submit = lambda *given, **more: told.append("thread")

from bmgraph.runtime.openvino.compiled import CompiledModels, Settings

models = CompiledModels(sys.argv[1], ["x"], Settings("f32", 1), 0)
import numpy
models.at(((2, 3),)).run({"x": numpy.ones((2, 3), numpy.float32)})
import openvino

assert hasattr(openvino, "convert_model")  # what else is in the process keeps all of it
assert not [name for name in sys.modules if name.startswith("openvino_telemetry")]
assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
assert not told, told
print("silent")
"""


def test_nothing_is_sent(tmp_path: Path) -> None:
    """OpenVINO's telemetry sends an event when it is imported; with us it is not even loaded."""
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "m.onnx")
    done = subprocess.run(
        [sys.executable, "-c", SILENT, str(tmp_path / "m.onnx")], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == "silent", done.stderr


def test_a_bundle_holds_onnx_and_computes_the_same_bits(small: OpenVinoEngine, tmp_path: Path) -> None:
    small.save(tmp_path / "out")
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == [
        "example.safetensors", "manifest.json", "model.onnx", "model.onnx.data",
    ]  # fmt: skip
    loaded = bg.load(tmp_path / "out", threads=1)
    assert isinstance(loaded, OpenVinoEngine)
    assert same(loaded(**tokens(3, 7)), small(**tokens(3, 7)))
    assert loaded.precision is small.precision
    assert loaded.report.records == small.report.records
    assert loaded.report.engine_drift == small.report.engine_drift
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (tmp_path / "out" / "model.onnx").read_bytes()


@pytest.mark.slow
def test_a_history_is_replayed_to_the_same_bits(
    small: OpenVinoEngine, tmp_path: Path, program: Program, model: TinyEncoder, batches: Batches
) -> None:
    small.save(tmp_path / "out")
    replayed = bg.replay(tmp_path / "out", model, calibration=batches)
    made = bg.Pipeline([Quantize("int8")]).run(program, calibration=batches, target=OpenVINO.target)
    assert all(torch.equal(value, made.tensors()[name]) for name, value in replayed.tensors().items())


def _said(**change: object) -> Any:
    return lambda manifest: manifest[bundle.SETTINGS].update(change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_said(version="2019.1"), BackendError, "by OpenVINO 2019.1, and this machine has"),
        (_said(precision="f8"), BundleError, "does not say how OpenVINO computes"),
        (_said(shapes=[]), BundleError, "does not say how OpenVINO computes"),
        (lambda manifest: manifest.pop(bundle.SETTINGS) and None, BundleError, "does not say how OpenVINO computes"),
        (lambda manifest: manifest.update(tables={"ids": "x"}), BundleError, "does not have the inputs and outputs"),
        (lambda manifest: manifest.update(inputs=manifest["inputs"][:1]), BundleError, "does not have the inputs and outputs"),
    ],
)  # fmt: skip
def test_a_manifest_that_does_not_fit_is_refused(
    engine: OpenVinoEngine, tmp_path: Path, change: Any, error: type[Exception], message: str
) -> None:
    engine.save(tmp_path / "out")
    edit_json(tmp_path / "out" / "manifest.json", change)
    with pytest.raises(error, match=message):
        bg.load(tmp_path / "out")


def test_another_version_computes_where_asked(engine: OpenVinoEngine, tmp_path: Path) -> None:
    engine.save(tmp_path / "out")
    edit_json(tmp_path / "out" / "manifest.json", _said(version="2019.1"))
    loaded = bg.load(tmp_path / "out", other_version=True)
    assert "compared with its program by OpenVINO 2019.1, not by this one" in str(loaded.report)
    assert same(loaded(**tokens()), engine(**tokens()))


def _own_operator(model: Any) -> None:
    model.graph.node[0].domain, model.graph.node[0].op_type = "com.microsoft", "FusedMatMul"


def _elsewhere(model: Any) -> None:
    weight = next(item for item in model.graph.initializer if item.external_data)
    weight.external_data[0].value = "/etc/passwd"


def _branch(model: Any) -> None:
    model.graph.node[0].op_type = "Loop"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_own_operator, "calls com.microsoft.FusedMatMul, which this engine does not run"),
        (_elsewhere, "which is not a file of the bundle"),
        (_branch, "calls Loop, which is not allowed"),
    ],
)
def test_hostile_models_are_refused_before_openvino_reads_them(
    engine: OpenVinoEngine, tmp_path: Path, change: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.save(tmp_path / "out")
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    change(model)
    (tmp_path / "out" / "model.onnx").write_bytes(model.SerializeToString())
    sign(tmp_path / "out")
    monkeypatch.setattr(compiled, "onnx_frontend", lambda: pytest.fail("OpenVINO was asked"))
    with pytest.raises(BundleError, match=message):
        bg.load(tmp_path / "out")


def test_only_onnx_is_read_whatever_a_file_is_called(engine: OpenVinoEngine, tmp_path: Path) -> None:
    """By itself OpenVINO would try its readers of all formats, whose models no allowlist of ours has seen."""
    openvino = library.import_openvino()
    openvino.save_model(library.core().read_model(str(engine.models.file)), str(tmp_path / "model.xml"))
    (tmp_path / "model.xml").rename(tmp_path / "model.onnx")
    with pytest.raises(BackendError, match="OpenVINO rejects"):
        CompiledModels(tmp_path / "model.onnx", ["ids", "attention_mask"], engine.settings, 0)


class Determinant(torch.nn.Module):
    """What ONNX has and OpenVINO lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.det(self.inner(x))


def test_what_openvino_lacks_is_told_with_its_place(
    engine: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        BackendError, match=r"OpenVINO rejects .* operations: Det-23; it is Det of .*, made by capture"
    ):
        bg.compile(Determinant(), example=(torch.randn(3, 4, 4),), backend="openvino")

    class Full:
        def compile_model(self, *given: object) -> None:
            raise RuntimeError("Exception from a.cpp:1:\nCheck 'b' failed\nno room for it\n")

    monkeypatch.setattr(compiled, "core", Full)
    with pytest.raises(
        BackendError, match=r"cannot compile .* for ids \[1, 17\], attention_mask \[1, 17\]: no room for it"
    ):
        engine(**tokens(1, 17))
    names = [spec.name for spec in engine.inputs]
    refused = CompiledModels(engine.models.file, names, replace(engine.settings, shapes="dynamic"), 0)
    with pytest.raises(
        BackendError, match="for all sizes: no room for it; take shapes='static', a model for each"
    ):
        refused.at(((1, 17), (1, 17)))


def test_what_was_compiled_is_never_read_from_a_bundle(engine: OpenVinoEngine, tmp_path: Path) -> None:
    engine.save(tmp_path / "out")
    (tmp_path / "out" / "model.blob").write_bytes(b"native code")
    with pytest.raises(BundleError, match=r"model\.blob"):
        bg.load(tmp_path / "out")


def test_files_of_the_bundle_may_go_once_it_is_loaded(engine: OpenVinoEngine, tmp_path: Path) -> None:
    engine.save(tmp_path / "out")
    loaded = bg.load(tmp_path / "out")
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / "out" / name).write_bytes(b"")
    assert same(loaded(**tokens(2, 11)), engine(**tokens(2, 11)))


def test_a_folder_keeps_what_was_compiled_where_asked(engine: OpenVinoEngine, tmp_path: Path) -> None:
    for _ in range(2):
        found = again(engine, cache=str(tmp_path / "kept")).run(feeds_of(engine, tokens()))
        assert list((tmp_path / "kept").iterdir())
        assert all(map(np.array_equal, found, engine.run(feeds_of(engine, tokens()))))


def test_rows_choose_deltas_and_these_are_exchanged(tmp_path: Path) -> None:
    plain = feedforward(2)
    folders = saved(plain, PAIRS["bitfit"], tmp_path)
    engine = bg.compile(plain, [Deltas(NAMES)], backend="openvino", resources=folders)
    batch = {"input": torch.randn(4, 8)}
    expected = by_rows(plain, folders, batch)
    engine.save(tmp_path / "out")
    for held in (engine, bg.load(tmp_path / "out")):
        assert relative_error(held(**batch, delta=ROWS)["output"], expected) < 1e-5
        assert relative_error(held(**batch)["output"], plain(**batch)["output"]) < 1e-5
    engine.deltas.swap("two", folders["one"])
    assert torch.equal(engine(**batch, delta="two")["output"], engine(**batch, delta="one")["output"])
