"""8-bit experts whose inputs are rounded by rows: a kernel for few tokens, an integer product per expert for more."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import Onnx
from bmgraph.backends.onnx import pack_experts
from bmgraph.ir.program import Program
from bmgraph.passes import MoEfy, Quantize
from bmgraph.runtime.ort.bundle import MODEL_FILE
from bmgraph.runtime.ort.engine import OrtEngine
from bmgraph.runtime.ort.profile import profile
from bmgraph.verify.metrics import relative_error
from tests.helpers.feedforwards import KINDS, calibration, captured_feedforward, inputs
from tests.helpers.sweep import sweep

pytest.importorskip("onnxruntime")

INT8 = Quantize("int8", activations="dynamic")
STEP = 2e-2
"""Relative to a feed-forward's output: a step of 8-bit activations, by which rows and blocks of them differ."""

KERNELS = ("QMoE", "MatMulNBits", "MatMulIntegerToFloat")


@pytest.fixture(scope="module", autouse=True)
def toys_are_large() -> Iterator[None]:
    """Calls cost nothing, as beside the multiplications of large experts."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("KERNEL", "KERNEL_CALL", "CALL", "ROW", "KERNEL_TANH"):
            patch.setattr(pack_experts, name, 0.0)
        yield


@cache
def rounded(kind: str, activation: str, moefy: MoEfy) -> Program:
    return bg.Pipeline([moefy, INT8]).run(
        captured_feedforward(kind, activation), calibration=calibration(), target=Onnx.target, max_drift=2.0
    )


@cache
def compiled(kind: str, activation: str, moefy: MoEfy) -> OrtEngine:
    return bg.compile(rounded(kind, activation, moefy), passes=[], backend="onnx")


def ran(engine: OrtEngine, x: torch.Tensor) -> set[str]:
    """The kernels of products that a call runs."""
    return {*KERNELS}.intersection(profile(engine, {"x": x}, runs=1).by("operator"))


def operators(engine: OrtEngine) -> list[str]:
    graph = onnx.load(str(engine.folder / MODEL_FILE), load_external_data=False).graph
    inner = [item.g for node in graph.node for item in node.attribute if item.HasField("g")]
    return [node.op_type for one in (graph, *inner) for node in one.node]


MORE: dict[str, dict[str, Any]] = {"plainly": {}, "threshold": {"threshold": 0.5}, "shared": {"shared": 1}}

CASES = [(*kind, more) for kind in (*KINDS, ("gated", "gelu")) for more in MORE]


@pytest.mark.parametrize(("kind", "activation", "name"), sweep(CASES, [("fused", "silu", "plainly")]))
def test_it_is_the_program_for_any_number_of_tokens(kind: str, activation: str, name: str) -> None:
    more = MORE[name]
    program = rounded(kind, activation, MoEfy(4, 2, **more))
    engine = compiled(kind, activation, MoEfy(4, 2, **more))
    few = any(name == "QMoE" for name in operators(engine))
    for shape in ((1, 1), (1, 2), (1, 8), (3, 3), (8, 25)):
        x = inputs(*shape, seed=9)
        alone = few and shape[0] * shape[1] <= max(pack_experts.KERNEL_ROWS)
        found, wanted = engine(x=x)["output"] - x, program(x=x)["output"] - x
        # The last bit may cross a rounding step for one value among many; another rounding would be 1e-2 away.
        assert relative_error(found, wanted) < (STEP if alone else 1e-3)


@pytest.mark.parametrize(
    ("activation", "token"),
    sweep([("relu", "8 tokens or fewer"), ("gelu", "tanh form")], [("gelu", "tanh form")]),
)
def test_few_tokens_call_the_kernel_and_the_report_says_so(activation: str, token: str) -> None:
    engine, limit = compiled("plain", activation, MoEfy(4, 2)), max(pack_experts.KERNEL_ROWS)
    assert ran(engine, inputs(1, limit)) == {"QMoE"}
    assert ran(engine, inputs(1, limit + 1)) == {"MatMulIntegerToFloat"}
    (said,) = [note for note in engine.report.notes if note.startswith("experts")]
    assert token in said
    assert "depends on the number of tokens" in said
    assert "both forms" in said


@pytest.mark.parametrize("tokens", sweep([2, 20], [20]))
def test_an_engine_for_one_number_of_tokens_has_one_form(tokens: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    x = torch.randn(tokens, 32)
    program = bg.capture(model, {"input": x}, dynamic={})
    options: dict[str, Any] = {
        "calibration": [{"input": torch.randn(tokens, 32)} for _ in range(20)],
        "max_drift": 2.0,
    }
    engine = bg.compile(program, [MoEfy(4, 2, router="random"), INT8], backend="onnx", **options)
    assert "If" not in operators(engine)
    assert ("QMoE" in operators(engine)) == (tokens == 2)


def test_a_token_gives_the_same_beside_any_others() -> None:
    engine = compiled("plain", "gelu", MoEfy(4, 2))
    x = inputs(1, 30, seed=4)
    alone = engine(x=x)["output"]
    loud = torch.cat([x, 50 * inputs(1, 40, seed=5)], 1)
    assert torch.equal(engine(x=loud)["output"][:, :30], alone)


def test_tokens_of_zeros() -> None:
    program, engine = rounded("plain", "gelu", MoEfy(4, 2)), compiled("plain", "gelu", MoEfy(4, 2))
    x = inputs(1, 12)
    x[:, ::2] = 0
    assert relative_error(engine(x=x)["output"], program(x=x)["output"]) < 1e-5
    assert bool(torch.isfinite(engine(x=torch.zeros(1, 12, 32))["output"]).all())


def test_what_lies_between_two_products_stays_in_the_order_of_experts() -> None:
    engine = compiled("fused", "silu", MoEfy(4, 2))
    found = operators(engine)
    assert "keep_expert_order" in dict(engine.report.rewrites)
    assert found.count("TopK") == 3  # the choice, the order and its inverse
    assert found.count("Gather") == 4  # of rows, their steps and biases, and of what the last product gave


@pytest.mark.slow
@pytest.mark.parametrize("experts", [3, 4])
def test_the_kernel_runs_alone_where_products_would_take_longer(
    experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_experts, "CALL", 1e9)
    engine = bg.compile(rounded("plain", "relu", MoEfy(experts, 2)), passes=[], backend="onnx")
    assert ran(engine, inputs(1, 40)) == ({"QMoE"} if experts == 4 else {"MatMulIntegerToFloat"})


def test_weights_are_stored_as_products_read_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64))
    x = torch.randn(29, 64)
    options: dict[str, Any] = {"calibration": [{"input": x}], "max_drift": 2.0, "example": {"input": x}}
    engine = bg.compile(model, [MoEfy(2, 1, router="random"), INT8], backend="onnx", **options)
    assert "Transpose" not in operators(engine)
    engine.save(tmp_path / "engine")
    assert torch.equal(bg.load(tmp_path / "engine")(input=x)["output"], engine(input=x)["output"])


@pytest.mark.slow
def test_a_program_of_the_former_target_has_its_blocks() -> None:
    passes = [MoEfy(4, 2), INT8]
    rows, blocks = (
        bg.Pipeline(passes).run(captured_feedforward(), calibration=calibration(), target=target)
        for target in (Onnx.target, Onnx.target.at("3"))
    )
    found = [
        [
            node.args[1]
            for node in program.graph.nodes
            if node.target is torch.ops.bmgraph.quantize_blocks.default
        ]
        for program in (rows, blocks)
    ]
    assert found == [[32, 16], [16, 16]]
    for program, calls in ((rows, {"MatMulIntegerToFloat"}), (blocks, {"QMoE"})):
        assert ran(bg.compile(program, passes=[], backend="onnx"), inputs(2, 9)) == calls
