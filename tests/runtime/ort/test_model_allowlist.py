"""The allowlist for ONNX files: files with other contents are refused before ONNX Runtime reads them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import bmgraph as bg
from bmgraph.errors import BundleError
from bmgraph.runtime.ort.model_allowlist import admit
from tests.helpers.bundles import edit_json, sign


def _model(
    nodes: Sequence[Any],
    weights: Sequence[Any] = (),
    shape: Sequence[int | str] = ("batch", 4),
    opsets: Sequence[tuple[str, int]] = (("", 23), ("com.microsoft", 1)),
) -> Any:
    graph = helper.make_graph(
        list(nodes),
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        list(weights),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(*item) for item in opsets])


def _weight(name: str, value: Any, dtype: Any = np.int64) -> Any:
    return numpy_helper.from_array(np.asarray(value, dtype), name)


def _node(op: str, inputs: str, output: str = "y", **options: Any) -> Any:
    return helper.make_node(op, inputs.split(), [output], name=f"the_{op.lower()}", **options)


def _admit(model: Any, folder: Path, data: str | None = None) -> tuple[list[str], list[str]]:
    size = (folder / data).stat().st_size if data else 0
    return admit(folder / "model.onnx", model.SerializeToString(), (data, size) if data else None)


SMALL = _weight("w", np.ones((4, 4)), np.float32)


def _subgraph() -> Any:
    return helper.make_graph([], "inner", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)])


REFUSED: dict[str, tuple[Any, str]] = {
    "unknown operator": (_model([_node("Nonsense", "x")]), "the_nonsense"),
    "compiled context": (_model([_node("EPContext", "x", domain="com.microsoft")]), "com.microsoft.EPContext"),
    "unknown domain": (_model([_node("Relu", "x", domain="evil")]), "evil.Relu"),
    "unknown operator set": (_model([_node("Relu", "x")], opsets=[("", 23), ("evil", 1)]), "'evil'"),
    "future operator set": (_model([_node("Relu", "x")], opsets=[("", 99)]), "99"),
    "branch": (_model([_node("If", "x", then_branch=_subgraph(), else_branch=_subgraph())]), "the_if"),
    "loop": (_model([_node("Loop", "x", body=_subgraph())]), "the_loop"),
    "hidden graph": (_model([_node("Relu", "x", body=_subgraph())]), "the_relu.* has a graph or a sparse tensor as an attribute"),
    "randomness": (_model([_node("RandomNormal", "", shape=[2])]), "the_randomnormal"),
    "window": (_model([_node("HannWindow", "s")], [_weight("s", 2**40)]), "the_hannwindow"),
    "large constant": (_model([_node("ConstantOfShape", "s")], [_weight("s", [2**16, 2**16])]), "the_constantofshape"),
    "large expand": (_model([_node("Expand", "w s")], [SMALL, _weight("s", [2**30, 4, 4])]), "the_expand"),
    "expand of both": (
        _model([_node("Expand", "c s")], [_weight("c", np.ones((4096, 1))), _weight("s", [1, 2**22])]),
        "the_expand",
    ),
    "large tile": (_model([_node("Tile", "w s")], [SMALL, _weight("s", [2**15, 2**15])]), "the_tile"),
    "chain of tiles": (
        _model(
            [_node("Tile", "w s", "a"), _node("Tile", "a s", "b"), _node("Tile", "b s")],
            [SMALL, _weight("s", [512, 1])],
        ),
        "the_tile",
    ),
    "hidden behind a reshape": (
        _model(
            [_node("Reshape", "w m", "a"), _node("Tile", "a s")],
            [_weight("w", np.ones(2**16)), _weight("m", [-1]), _weight("s", [2**16])],
        ),
        "the_tile",
    ),
    "outer product": (
        _model([_node("Mul", "a b")], [_weight("a", np.ones((2**14, 1))), _weight("b", np.ones((1, 2**14)))]),
        "the_mul",
    ),
    "computed size": (
        _model([_node("Mul", "s s", "t"), _node("ConstantOfShape", "t")], [_weight("s", [2**20])]),
        "the_constantofshape",
    ),
    "size of an input": (
        _model([_node("Shape", "x", "s"), _node("ConstantOfShape", "s")], shape=(2**16, 2**16)),
        "the_constantofshape",
    ),
    "fixed half of an input": (
        _model([_node("Shape", "x", "s", start=1), _node("ConstantOfShape", "s")], shape=("batch", 2**40)),
        "the_constantofshape",
    ),
    "range": (
        _model([_node("Range", "a b c")], [_weight("a", 0), _weight("b", 2**40), _weight("c", 1)]),
        "the_range",
    ),
    "padding": (_model([_node("Pad", "w p")], [SMALL, _weight("p", [2**20] * 4)]), "the_pad"),
    "padding of a convolution": (
        _model(
            [_node("Conv", "a b", pads=[2**20] * 4)],
            [_weight("a", np.ones((1, 1, 2, 2)), np.float32), _weight("b", np.ones((1, 1, 1, 1)), np.float32)],
        ),
        "the_conv",
    ),
    "text constant": (
        _model([_node("Relu", "x")], [helper.make_tensor("t", TensorProto.STRING, [1], [b"text"])]),
        "holds strings",
    ),
    "sizes that are no integers": (
        _model([_node("ConstantOfShape", "s")], [_weight("s", [np.nan], np.float32)]),
        "the_constantofshape.*not integers",
    ),
    "product of many": (
        _model([_node("Sum", " ".join(["w"] * 100_000))], [SMALL]),
        "the_sum.*expands constants",
    ),
    "weight twice": (_model([_node("Relu", "x")], [SMALL, SMALL]), "twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    model, message = REFUSED[name]
    with pytest.raises(BundleError, match=message):
        _admit(model, tmp_path)


def test_an_input_without_a_name_is_no_size(tmp_path: Path) -> None:
    model = _model([helper.make_node("Concat", ["w", ""], ["y"], axis=0)], [SMALL])
    assert _admit(model, tmp_path) == (["x"], ["y"])


def test_what_we_emit_is_admitted(tmp_path: Path) -> None:
    model = _model(
        [
            _node("Shape", "x", "n", start=0, end=1),
            _node("ConstantOfShape", "n", "zeros"),
            _node("MatMul", "x w", "product"),
            _node("Gelu", "product", "g", domain="com.microsoft"),
            _node("Expand", "row s", "rows"),
            _node("Add", "g rows"),
        ],
        [SMALL, _weight("row", [1, 1, 1, 1], np.float32), _weight("s", [1, 4])],
    )
    assert _admit(model, tmp_path) == (["x"], ["y"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": [4, 5]}, "64 bytes for 20 elements"),
        ({"dims": [-4, -4]}, "negative"),
        ({"dims": [2**62, 4]}, "bytes for"),
        ({"data_type": 99}, "unknown type"),
        ({"data_type": 0}, "unknown type"),
        ({"raw_data": b""}, "0 values for 16"),
    ],
)
def test_weights_with_false_sizes(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = _model([_node("MatMul", "x w")], [SMALL])
    weight = model.graph.initializer[0]
    for key, value in change.items():
        if key == "dims":
            del weight.dims[:]
            weight.dims.extend(value)
        else:
            setattr(weight, key, value)
    with pytest.raises(BundleError, match=message):
        _admit(model, tmp_path)


@pytest.mark.parametrize(
    ("location", "offset", "length"),
    [
        ("../model.onnx.data", 0, 64),
        ("/etc/passwd", 0, 64),
        ("other.data", 0, 64),
        ("model.onnx", 0, 64),
        ("model.onnx.data", 1, 64),
        ("model.onnx.data", -64, 64),
        ("model.onnx.data", 0, 128),
        ("model.onnx.data", 0, -1),
        ("model.onnx.data", "zero", 64),
    ],
)
def test_bad_external_weights_are_refused(location: str, offset: Any, length: int, tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").write_bytes(b"\0" * 64)

    def model(*place: Any) -> Any:
        made = _model([_node("MatMul", "x w")], [SMALL])
        weight = made.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in zip(("location", "offset", "length"), place):
            weight.external_data.add(key=key, value=str(value))
        return made

    _admit(model("model.onnx.data", 0, 64), tmp_path, "model.onnx.data")
    with pytest.raises(BundleError, match="'w'"):
        _admit(model(location, offset, length), tmp_path, "model.onnx.data")


def test_functions_are_refused(tmp_path: Path) -> None:
    model = _model([_node("Relu", "x")])
    model.functions.append(
        helper.make_function(
            "evil", "F", ["a"], ["b"], [_node("Relu", "a", "b")], [helper.make_opsetid("", 23)]
        )
    )
    with pytest.raises(BundleError, match="functions"):
        _admit(model, tmp_path)


def test_files_that_are_not_models(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a valid ONNX model"):
        admit(tmp_path / "model.onnx", b"\xff" * 100, None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "engine"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2))
    bg.compile(model, example=(torch.randn(3, 4),), backend="onnx").save(folder)
    return folder


def test_an_engine_comes_back(saved: Path) -> None:
    engine = bg.load(saved)
    assert engine(input=torch.ones(2, 4))[engine.outputs[0].name].shape == (2, 2)


def test_an_engine_whose_model_was_exchanged(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "engine"))
    (folder / "model.onnx").write_bytes(_model([_node("Relu", "x")]).SerializeToString())
    with pytest.raises(BundleError, match=r"model\.onnx"):
        bg.load(folder)
    sign(folder)
    with pytest.raises(BundleError, match=r"does not have the inputs and outputs|lies in"):
        bg.load(folder)


def test_an_engine_whose_manifest_lacks_parts(saved: Path, tmp_path: Path) -> None:
    for index, key in enumerate(("inputs", "outputs", "ranges", "history", "drift", "backend", "weights")):
        folder = Path(shutil.copytree(saved, tmp_path / str(index)))
        edit_json(
            folder / "manifest.json",
            lambda value, key=key: {name: item for name, item in value.items() if name != key},
        )
        with pytest.raises(BundleError, match=key):
            bg.load(folder)


def test_onnx_runtime_never_sees_a_refused_file(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "engine"))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.node.append(_node("EPContext", "input", "z", domain="com.microsoft"))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    sign(folder)
    monkeypatch.setattr(
        "bmgraph.runtime.ort.model_files.make_session", lambda *_: pytest.fail("a session was made")
    )
    with pytest.raises(BundleError, match="EPContext"):
        bg.load(folder)
