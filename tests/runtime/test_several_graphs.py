"""Engines and trainers of a program of two graphs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import AdamW, Onnx, OpenVINO, Torch
from bmgraph.errors import BundleError
from bmgraph.ir.program import Program
from bmgraph.passes import Prune
from bmgraph.runtime.ort import bundle
from bmgraph.verify.metrics import relative_error
from tests.helpers.bundles import edit_json, sign
from tests.helpers.two_graphs import Translator, batch, captured


@pytest.fixture(scope="module")
def two() -> tuple[Translator, Program]:
    return captured()


WITH_OPENVINO = pytest.param(
    OpenVINO(), marks=pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
)


@pytest.mark.parametrize("backend", [Onnx(), Torch(), WITH_OPENVINO], ids=["onnx", "torch", "openvino"])
def test_an_engine_has_an_engine_of_each_graph(
    two: tuple[Translator, Program], backend: Any, tmp_path: Path
) -> None:
    _, program = two
    engine = bg.compile(program, passes=[Prune()], backend=backend)
    assert set(engine.graphs) == {"encode"}
    pruned = bg.Pipeline([Prune()]).run(program)
    given = batch(1)
    wanted = pruned(**given)["scores"]
    assert relative_error(engine(**given)["scores"], wanted) < 1e-5
    memory = engine.graphs["encode"](ids=given["ids"], attention_mask=given["attention_mask"])["memory"]
    rest = {name: value for name, value in given.items() if name != "ids"}
    assert relative_error(engine(memory=memory, **rest)["scores"], wanted) < 1e-5
    assert engine.report.engine_drift < 1e-5
    moved = relative_error(pruned(**batch())["scores"], program(**batch())["scores"])
    assert engine.report.total_drift == pytest.approx(moved, rel=1e-3)
    engine.save(tmp_path / "saved")
    loaded = bg.load(tmp_path / "saved")
    assert relative_error(loaded(**given)["scores"], wanted) < 1e-5


def test_engines_of_early_versions_have_an_encoder(
    two: tuple[Translator, Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They kept it in `encoder.onnx`, and what they said of it under that name in the manifest."""
    program = two[1].clone()
    program.graphs = {"encoder": program.graphs["encode"], "forward": program.graphs["forward"]}
    program.signatures["encoder"] = program.signatures.pop("encode")
    monkeypatch.setattr("bmgraph.backends.onnx.backend.graph_file", lambda name: f"{name}.onnx")
    engine = bg.compile(program, backend="onnx")
    engine.save(tmp_path / "saved")

    def as_early(manifest: dict[str, Any]) -> None:
        manifest["encoder"] = manifest.pop(bundle.GRAPHS)["encoder"]

    edit_json(tmp_path / "saved" / "manifest.json", as_early)
    sign(tmp_path / "saved")
    loaded = bg.load(tmp_path / "saved")
    assert set(loaded.graphs) == {"encoder"}
    assert torch.equal(loaded(**batch(1))["scores"], engine(**batch(1))["scores"])
    edit_json(tmp_path / "saved" / "manifest.json", lambda manifest: manifest.pop("encoder") and None)
    sign(tmp_path / "saved")
    with pytest.raises(BundleError, match="does not describe the graph 'encoder'"):
        bg.load(tmp_path / "saved")


def test_it_trains_as_one() -> None:
    _, program = captured(training=True)

    def loss(outputs: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> Any:
        return outputs["scores"].square().sum(), torch.ones_like(outputs["scores"]).sum()

    given = batch(2)
    trainer = bg.compile(program, backend=Torch(optimizer=AdamW(lr=1e-2), loss=loss))
    first = trainer.step(given).loss
    assert trainer.step(given).loss < first
    after = trainer.program()
    assert set(after.graphs) == {"encode", "forward"}
    moved = [
        name for name, value in after.parameters.items() if not torch.equal(value, program.parameters[name])
    ]
    assert any(name.startswith("encoder.") for name in moved)
    assert any(name.startswith("own.") for name in moved)
    assert after(**given)["scores"].shape == (3, 5, 24)
