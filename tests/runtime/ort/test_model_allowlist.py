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


CODES = (
    _weight("w", np.zeros((8, 1, 8)), np.uint8), _weight("r", np.zeros((8, 8)), np.uint8),
    _weight("s", np.ones((8, 1)), np.float32),
)  # fmt: skip
SMALL = _weight("w", np.ones((4, 4)), np.float32)


def _subgraph() -> Any:
    return helper.make_graph([], "inner", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)])


def _with_sequence() -> Any:
    model = _model([_node("Relu", "x")])
    model.graph.value_info.append(helper.make_tensor_sequence_value_info("z", TensorProto.FLOAT, None))
    return model


REFUSED: dict[str, tuple[Any, str]] = {
    "attention without lengths": (
        _model([_node("GroupQueryAttention", "x x x x x", domain="com.microsoft", num_heads=1, kv_num_heads=1)]),
        "the_groupqueryattention.* lacks its input 5",
    ),
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
    "least number by -1": (_model([_node("Div", "a b")], [_weight("a", [-(2**63)] * 8), _weight("b", -1)]), "divides integers by 0 or -1"),
    "remainder of -1": (_model([_node("Mod", "a b")], [_weight("a", [-(2**63)]), _weight("b", [2, -1])]), "the_mod"),
    "division by zero": (_model([_node("Div", "a b")], [_weight("a", [1] * 8, np.int32), _weight("b", [0], np.int32)]), "the_div"),
    "divisor of the run": (_model([_node("Shape", "x", "s"), _node("Div", "a s")], [_weight("a", [1, 2])]), "not a constant of the file"),
    "no heads": (_model([_node("Attention", "x x x", q_num_heads=0, kv_num_heads=1)]), "'q_num_heads' = 0: expected 1"),
    "heads of 2**40": (_model([_node("Attention", "x x x", q_num_heads=2, kv_num_heads=2**40)]), "'kv_num_heads' = 1099511627776"),
    "huge blocks": (_model([_node("DepthToSpace", "x", blocksize=2**40)]), "'blocksize' = 1099511627776"),
    "no groups": (_model([_node("GroupNormalization", "x w w", num_groups=0)], [_weight("w", [1.0], np.float32)]), "'num_groups' = 0"),
    "no step": (_model([_node("MaxPool", "x", kernel_shape=[2], strides=[0])]), "'strides' with 0: expected 1"),
    "left out input": (_model([helper.make_node("Sum", ["x", ""], ["y"], name="the_sum")]), "the_sum.* lacks its input 1"),
    "left out first input": (_model([helper.make_node("Relu", [""], ["y"], name="the_relu")]), "the_relu.* lacks its input 0"),
    "left out part": (_model([helper.make_node("Concat", ["w", ""], ["y"], name="the_concat", axis=0)], [SMALL]), "the_concat.* lacks its input 1"),
    "odd blocks": (
        _model([_node("MatMulNBits", "x w w", domain="com.microsoft", K=4, N=4, bits=8, block_size=3)], [SMALL]),
        "blocks of 3",
    ),
    "fewer codes than outputs": (
        _model([_node("MatMulNBits", "x w s", domain="com.microsoft", K=16, N=9, block_size=16)], [*CODES]),
        "its input 1 has 64 elements, and its attributes say 72",
    ),
    "fewer zero points than blocks": (
        _model([_node("MatMulNBits", "x r s z", domain="com.microsoft", K=16, N=8, block_size=16)], [*CODES, _weight("z", [1] * 7, np.uint8)]),
        "its input 3 has 7 elements, and its attributes say 8",
    ),
    "zero points of another type": (
        _model([_node("MatMulNBits", "x r s s", domain="com.microsoft", K=16, N=8, block_size=16)], [*CODES]),
        "its input 3 is FLOAT, and codes and zero points are packed in UINT8",
    ),
    "rows with fewer zero points": (
        _model(
            [_node("Clip", "x low high", "c"), _node("GatherBlockQuantized", "r c s z", domain="com.microsoft", block_size=16)],
            [*CODES, _weight("low", 0), _weight("high", 7), _weight("z", [1] * 7, np.uint8)],
        ),
        "its input 3 has 7 elements, and its attributes say 8",
    ),
    "ids beyond a table": (
        _model([_node("GatherBlockQuantized", "r x s", domain="com.microsoft", block_size=16)], [*CODES]),
        "by ids that are not clipped to the 8 rows",
    ),
    "ids clipped beyond a table": (
        _model(
            [_node("Clip", "x low high", "c"), _node("GatherBlockQuantized", "r c s", domain="com.microsoft", block_size=16)],
            [*CODES, _weight("low", 0), _weight("high", 8)],
        ),
        "by ids that are not clipped to the 8 rows",
    ),
    "odd blocks of rows": (
        _model([_node("GatherBlockQuantized", "w x w", domain="com.microsoft", bits=4, block_size=48)], [SMALL]),
        "GatherBlockQuantized.* has blocks of 48",
    ),
    "rows along another axis": (
        _model([_node("GatherBlockQuantized", "w x w", domain="com.microsoft", bits=4, quantize_axis=0)], [SMALL]),
        "GatherBlockQuantized.* has other axes",
    ),
    "circle": (_model([_node("Add", "x b", "a"), _node("Add", "x a", "b")]), "reads 'b', which nothing before it makes"),
    "out of order": (_model([_node("Relu", "a", "y"), _node("Relu", "x", "a")]), "the_relu.* reads 'a'"),
    "made twice": (_model([_node("Relu", "x"), _node("Abs", "x")]), "the_abs.* makes 'y', which is there already"),
    "empty and huge": (
        _model([_node("ReduceSum", "w a")], [helper.make_tensor("w", TensorProto.FLOAT, [0, 2**33], b"", raw=True), _weight("a", [0])]),
        "'w' is empty, with other sizes of",
    ),
    "many constants of some size": (
        _model([_node("ConstantOfShape", "s", f"c{index}") for index in range(40)] + [_node("Relu", "x")], [_weight("s", [2**22])]),
        "all such nodes together make too many bytes",
    ),
    "not a number as a size": (_model([_node("Expand", "x s")], [_weight("s", [float("nan")], np.float32)]), "sizes that are not integers"),
    "sequence": (_with_sequence(), "values that are not tensors"),
    "weight twice": (_model([_node("Relu", "x")], [SMALL, SMALL]), "twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    model, message = REFUSED[name]
    with pytest.raises(BundleError, match=message):
        _admit(model, tmp_path)


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


def _stored(name: str, kind: int, rows: int, length: int) -> Any:
    """A weight [rows, 4096] in a file beside the model."""
    weight = TensorProto(name=name, data_type=kind, dims=[rows, 4096], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "model.onnx.data"), ("offset", "0"), ("length", str(length))):
        weight.external_data.add(key=key, value=value)
    return weight


def test_large_codes_may_be_dequantized_and_transposed_once(tmp_path: Path) -> None:
    rows, nodes = (
        2**13,
        [_node("DequantizeLinear", "c s", "w"), _node("Transpose", "w", "t"), _node("MatMul", "x t")],
    )
    scale = _weight("s", 1.0, np.float32)
    for kind, length in ((TensorProto.INT8, rows * 4096), (TensorProto.INT4, rows * 2048)):
        held, codes = ("model.onnx.data", length), _stored("c", kind, rows, length)

        def admitted(model: Any, held: tuple[str, int] = held) -> None:
            admit(tmp_path / "model.onnx", model.SerializeToString(), held)

        admitted(_model(nodes, [codes, scale]))
        with pytest.raises(BundleError, match="does not lie within"):
            admitted(_model(nodes, [_stored("c", kind, rows, length // 2), scale]))
        again = [*nodes[:2], _node("Transpose", "w", "u"), _node("Add", "x u", "z"), nodes[2]]
        with pytest.raises(BundleError, match="all such nodes together make too many bytes"):
            admitted(_model(again, [codes, scale]))


def test_a_file_of_many_small_messages_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two bytes a node: 3 MB in the file would be a gigabyte in memory."""
    graph = b"\x0a\x00" * 1_500_000
    length = len(graph)
    sizes = bytes([(length & 127) | 128, (length >> 7 & 127) | 128, (length >> 14 & 127) | 128, length >> 21])
    monkeypatch.setattr(onnx.ModelProto, "FromString", lambda _: pytest.fail("the file was parsed"))
    with pytest.raises(BundleError, match="holds more than 600000 nodes, weights and entries"):
        admit(tmp_path / "model.onnx", b"\x3a" + sizes + graph, None)


def test_numbers_that_grow_when_they_are_parsed_are_refused(tmp_path: Path) -> None:
    weight = TensorProto(name="w", data_type=TensorProto.INT64, dims=[2**25], int64_data=[0] * 2**25)
    with pytest.raises(BundleError, match="16 MiB of numbers that are not stored raw"):
        _admit(_model([_node("Relu", "x")], [weight]), tmp_path)


def test_a_graph_of_too_many_nodes_is_refused(tmp_path: Path) -> None:
    chain = [helper.make_node("Abs", [f"v{i}" if i else "x"], [f"v{i + 1}"]) for i in range(12_000)]
    with pytest.raises(BundleError, match=r"has 12000 nodes: at most \d+ are allowed"):
        _admit(_model(chain), tmp_path)


@pytest.mark.parametrize("cut", [1, 7, 40, 100])
def test_cut_files_are_told(tmp_path: Path, cut: int) -> None:
    data = _model([_node("MatMul", "x w")], [SMALL]).SerializeToString()
    with pytest.raises(BundleError, match=r"is not a valid ONNX model"):
        admit(tmp_path / "model.onnx", data[:-cut], None)


def test_divisors_that_are_harmless(tmp_path: Path) -> None:
    _admit(
        _model(
            [
                _node("Shape", "x", "s"),
                _node("Unsqueeze", "two a", "twos"),
                _node("Div", "s twos", "halves"),
                _node("Cast", "halves", "f", to=TensorProto.FLOAT),
                _node("Div", "x f"),
            ],
            [_weight("two", 2), _weight("a", [0])],
        ),
        tmp_path,
    )


def test_rows_of_a_table_in_codes_are_floats(tmp_path: Path) -> None:
    """Their codes are integers, so they were refused as if integers were divided by something computed."""
    rows = _node("GatherBlockQuantized", "r c s", "rows", domain="com.microsoft", block_size=16, bits=8)
    ids = [_node("Shape", "x", "i"), _node("Clip", "i low high", "c")]
    graph = [*ids, rows, _node("Abs", "rows", "d"), _node("Div", "rows d")]
    _admit(_model(graph, [*CODES[1:], _weight("low", 0), _weight("high", 7)]), tmp_path)


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
