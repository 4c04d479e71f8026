"""Two forms in one engine: a call computes the one for its number of rows, and files with other branches are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

import bmgraph as bg
from bmgraph.backends.onnx import mask_experts
from bmgraph.errors import BundleError
from bmgraph.passes import MoEfy, Quantize
from bmgraph.runtime.ort.bundle import MODEL_FILE
from bmgraph.runtime.ort.model_allowlist import admit
from bmgraph.runtime.ort.profile import profile
from bmgraph.verify.metrics import relative_error
from tests.helpers.feedforwards import calibration, captured_feedforward, inputs

pytest.importorskip("onnxruntime")

WIDTH, LIMIT = 8, 3


@pytest.fixture(scope="module", autouse=True)
def products_per_expert() -> Iterator[None]:
    """Toys have a product per expert, as large experts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_experts, "WEIGHTS", 1e9)
        yield


class Forms(torch.nn.Module):
    """A product for few rows, another for many; they share what enters, and `plain` is one of them as it is."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain = plain
        self.few, self.many = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        entering = torch.tanh(x)
        many = entering if self.plain else torch.relu(self.many(entering))
        made = torch.ops.bmgraph.by_rows(self.few(entering), many, x, LIMIT * WIDTH)
        return made / 3 + entering


@pytest.mark.parametrize("plain", [False, True])
def test_the_number_of_rows_decides(plain: bool, tmp_path: Path) -> None:
    model = Forms(plain)
    engine = bg.compile(model, [], example={"x": torch.randn(5, WIDTH)}, backend="onnx")
    engine.save(tmp_path / "engine")
    loaded = bg.load(tmp_path / "engine")
    for rows in (1, LIMIT, LIMIT + 1, 9):
        x = torch.randn(rows, WIDTH)
        wanted = torch.tanh(x)
        form = model.few(wanted) if rows <= LIMIT else wanted if plain else torch.relu(model.many(wanted))
        for one in (engine, loaded):
            assert torch.allclose(one(x=x)["output"], form / 3 + wanted, atol=1e-6)
    graph = onnx.load(str(engine.folder / MODEL_FILE)).graph
    (choice,) = [node for node in graph.node if node.op_type == "If"]
    held = {item.name: [node.op_type for node in item.g.node] for item in choice.attribute}
    assert "Relu" not in held["then_branch"]
    assert held["else_branch"] == ["Identity"] if plain else "Relu" in held["else_branch"]
    assert not {"Gemm", "MatMul", "Relu"}.intersection(node.op_type for node in graph.node)
    assert any(item.site for item in profile(engine, {"x": torch.randn(1, WIDTH)}, runs=1).nodes)


def test_one_token_calls_the_kernel_and_more_have_exact_gelu() -> None:
    passes = [MoEfy(4, 2), Quantize("int8", activations="dynamic")]
    program = bg.Pipeline(passes).run(
        captured_feedforward("plain", "gelu"),
        calibration=calibration(),
        target=bg.backends.Onnx.target.at("3"),
    )
    engine = bg.compile(program, passes=[], backend="onnx")
    for shape, bound in (((1, 1), 1e-2), ((1, 2), 1e-4), ((1, 7), 1e-4), ((8, 8), 1e-4), ((8, 25), 1e-4)):
        x = inputs(*shape, seed=9)
        assert relative_error(engine(x=x)["output"] - x, program(x=x)["output"] - x) < bound
    for tokens, operator in ((1, "QMoE"), (2, "MatMulNBits")):
        ran = profile(engine, {"x": inputs(1, tokens)}, runs=1).by("operator")
        assert operator in ran
        assert len({"QMoE", "MatMulNBits"}.intersection(ran)) == 1
    (said,) = [note for note in engine.report.notes if note.startswith("experts")]
    assert "1 token" in said
    assert "0.00048" in said


def test_the_tanh_form_is_as_close_as_the_report_says() -> None:
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    exact, tanh = (torch.nn.functional.gelu(x, approximate=form) for form in ("none", "tanh"))
    assert 4.7e-4 < float((exact - tanh).abs().max()) < 4.8e-4


def _model(change: Any = None, limit: Any = None) -> bytes:
    """A file with an If, as our backend writes them, after a change."""
    value = helper.make_tensor_value_info
    sides = [
        helper.make_graph(
            [helper.make_node(name, ["x"], [name])], name, [], [value(name, TensorProto.FLOAT, None)]
        )
        for name in ("Relu", "Tanh")
    ]
    nodes = [
        helper.make_node("Size", ["x"], ["size"], name="size"),
        helper.make_node("LessOrEqual", ["size", "limit"], ["fits"], name="fits"),
        helper.make_node("If", ["fits"], ["y"], name="choice", then_branch=sides[0], else_branch=sides[1]),
    ]
    weights = [helper.make_tensor("limit", TensorProto.INT64, [], [3])]
    given, made = value("x", TensorProto.FLOAT, ["rows"]), value("y", TensorProto.FLOAT, ["rows"])
    graph = helper.make_graph(nodes, "main", [given], [made], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    if change is not None:
        change(model.graph, {item.name: item.g for item in model.graph.node[2].attribute})
    return model.SerializeToString()


def _set_condition(graph: Any, branches: Any) -> None:
    graph.node.insert(0, helper.make_node("IsNaN", ["x"], ["odd"], name="odd"))
    graph.node[3].input[0] = "odd"


def _rename(graph: Any, branches: Any) -> None:
    branches["then_branch"].node[0].output[0] = branches["then_branch"].output[0].name = "Tanh"
    branches["else_branch"].node[0].output[0] = branches["else_branch"].output[0].name = "Tanh"


def _nest(graph: Any, branches: Any) -> None:
    inner = helper.make_node("If", ["fits"], ["Relu"], name="inner", **branches)
    del branches["then_branch"].node[:]
    branches["then_branch"].node.append(inner)


REFUSED: dict[str, tuple[Any, str]] = {
    "unknown operator": (lambda graph, sides: setattr(sides["then_branch"].node[0], "op_type", "Loop"), "calls Loop"),
    "own weights": (
        lambda graph, sides: sides["else_branch"].initializer.append(helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0])),
        "inputs or weights of its own",
    ),
    "a value from nowhere": (lambda graph, sides: sides["else_branch"].node[0].input.__setitem__(0, "z"), "reads 'z'"),
    "a value of the other branch": (
        lambda graph, sides: sides["else_branch"].node[0].input.__setitem__(0, "Relu"), "reads 'Relu'|makes",
    ),
    "a name twice": (_rename, "makes 'Tanh'"),
    "chooses by values": (_set_condition, "does not choose by the number of elements"),
    "branches within": (_nest, "branches again"),
    "a third graph": (
        lambda graph, sides: graph.node[2].attribute.append(helper.make_attribute("other", sides["then_branch"])),
        "two branches alone",
    ),
    "a hidden graph": (
        lambda graph, sides: graph.node[0].attribute.append(helper.make_attribute("body", sides["then_branch"])),
        "has a graph",
    ),
}  # fmt: skip


def test_a_choice_of_ours_is_admitted(tmp_path: Path) -> None:
    assert admit(tmp_path / "model.onnx", _model(), None) == (["x"], ["y"])


@pytest.mark.parametrize("case", list(REFUSED))
def test_other_branches_are_refused(case: str, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    with pytest.raises(BundleError, match=message):
        admit(tmp_path / "model.onnx", _model(change), None)
