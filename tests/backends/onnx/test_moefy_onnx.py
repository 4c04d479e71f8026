"""MoEfied feed-forwards as ONNX engines: equal to naive sums over the chosen experts; others are never read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends.onnx import mask_experts
from bmgraph.errors import BundleError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.target import TORCH
from bmgraph.passes import MoEfy, Quantize
from bmgraph.runtime.node_times import all_nodes
from bmgraph.runtime.ort.bundle import MODEL_FILE
from bmgraph.runtime.ort.engine import OrtEngine
from bmgraph.runtime.ort.model_allowlist import admit
from bmgraph.verify.metrics import relative_error
from tests.helpers.feedforwards import (
    KINDS,
    calibration,
    captured_feedforward,
    inputs,
    moefied,
    naive_sum,
)
from tests.helpers.models import tokens
from tests.helpers.sweep import sweep

pytest.importorskip("onnxruntime")

EXPERTS, ACTIVE = 4, 1

ROUNDING = torch.ops.bmgraph.quantize_blocks.default

TAKEN = (("plain", "relu"), ("gated", "silu"), ("gated", "gelu"))
"""Two feed-forwards that a mixture kernel supports, and one that needs one product per expert or gathered codes."""

QUICK = {
    ("plain", "relu", "fp32"), ("plain", "relu", "int8 first"), ("gated", "silu", "fp32"), ("gated", "silu", "then int8"),
    ("gated", "gelu", "then int8 weights"), ("gated", "gelu", "int8 first, dynamic"),
}  # fmt: skip
"""Each order, kernel and kind once; the other cases are slow tests."""


@pytest.fixture(scope="module", autouse=True)
def products_per_expert() -> Iterator[None]:
    """Toys have a product per expert, as large experts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_experts, "WEIGHTS", 1e9)
        yield


def cases(kinds: Iterable[tuple[str, str]], orders: Iterable[str]) -> list[Any]:
    """Every kind in every order."""
    return sweep([(*kind, order) for kind in kinds for order in orders], QUICK)


ORDERS: dict[str, tuple[Any, ...]] = {
    "fp32": (MoEfy(EXPERTS, ACTIVE),),
    "then int8 weights": (MoEfy(EXPERTS, ACTIVE), Quantize("int8", activations="none")),
    "then int8": (MoEfy(EXPERTS, ACTIVE), Quantize("int8", activations="dynamic")),
    "int8 first": (Quantize("int8", activations="static"), MoEfy(EXPERTS, ACTIVE)),
    "int8 first, dynamic": (Quantize("int8", activations="dynamic"), MoEfy(EXPERTS, ACTIVE)),
}

APART = [order for order in ORDERS if order != "int8 first, dynamic"]
"""Orders where tokens are independent; with one dynamic scale for all tokens each one affects the others."""

TOLERANCE = {
    "fp32": 1e-5, "then int8 weights": 3e-4, "then int8": 2e-2, "int8 first": 2e-2, "int8 first, dynamic": 2e-2,
}  # fmt: skip
"""Relative to a feed-forward's output: rounding; tanh GELU; one step of 8-bit activations (0.4% of the largest)."""


@cache
def compiled(kind: str, activation: str, order: str) -> tuple[Program, OrtEngine]:
    """The lowered program and its engine."""
    program = bg.Pipeline(ORDERS[order]).run(
        captured_feedforward(kind, activation), calibration=calibration()
    )
    return program, bg.compile(program, passes=[], backend="onnx", calibration=calibration())


class Opened:
    """An engine's model in memory that also returns which experts it chose."""

    def __init__(self, engine: OrtEngine) -> None:
        self.model = onnx.load(str(engine.folder / MODEL_FILE))
        self.ids = self._choice()
        self.model.graph.output.append(onnx.ValueInfoProto(name=self.ids))

    def _choice(self) -> str:
        """The value that holds the ids; where a kernel chooses by scores, computed here from the same scores."""
        graph, outside = self.model.graph, list(self.model.graph.node)
        for node in all_nodes(graph):
            (largest,) = [item.i for item in node.attribute if item.name == "largest"] or [1]
            if node.op_type == "TopK" and largest and node in outside:
                return str(node.output[1])
        place = {"TopK": 0, "QMoE": 1}
        read = [node.input[place[node.op_type]] for node in all_nodes(graph) if node.op_type in place]
        scores = next(name for name in read if any(name in node.output for node in outside))
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([ACTIVE]), "active"))
        graph.node.append(onnx.helper.make_node("TopK", [scores, "active"], ["highest", "ids"]))
        return "ids"

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The output and the ids, i64[T, K]."""
        session = onnxruntime.InferenceSession(
            self.model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        output, ids = session.run(["output", self.ids], {"x": x.numpy()})
        return torch.from_numpy(output), torch.from_numpy(ids).reshape(-1, ids.shape[-1])

    def poison(self, expert: int) -> int:
        """Write NaN into all stored weights, biases and scales of one expert; returns the number of tensors changed."""
        alone = self._weights_of(expert)
        count = 0
        for item in self.model.graph.initializer:
            value = onnx.numpy_helper.to_array(item).copy()
            if item.name in alone:
                value[:] = np.nan
            elif value.ndim >= 2 and value.shape[0] == EXPERTS and value.dtype == np.float32:
                value[expert] = np.nan
            else:
                continue
            item.CopyFrom(onnx.numpy_helper.from_array(value, item.name))
            count += 1
        return count

    def _weights_of(self, expert: int) -> set[str]:
        """The tensors that only rows that chose the expert read: weights and biases; for 8-bit weights, scales and biases."""
        rows = [set(places) for places in zip(*(item.output for item in self._of("Split")))]
        beside = {"Gemm": (1, 2), "MatMulIntegerToFloat": (3, 6), "MatMulNBits": (2, 5)}
        read: list[set[str]] = [set() for _ in rows]
        for node in self._of(*beside):
            for place in beside[node.op_type]:
                for number, names in enumerate(rows):
                    if node.input[0] in names:
                        read[number].update(node.input[place : place + 1])
        others = [names for number, names in enumerate(read) if number != expert]
        return read[expert].difference(*others) if read else set()

    def _of(self, *operators: str) -> list[onnx.NodeProto]:
        return [node for node in self.model.graph.node if node.op_type in operators]


@pytest.mark.parametrize(("kind", "activation", "order"), cases(dict.fromkeys((*TAKEN, *KINDS)), ORDERS))
def test_it_is_the_naive_sum_over_the_experts_that_the_engine_chose(
    kind: str, activation: str, order: str
) -> None:
    program, engine = compiled(kind, activation, order)
    for shape in ((1, 1), (3, 5)):
        x = inputs(*shape, seed=77)
        found, ids = Opened(engine)(x)
        wanted = naive_sum(program, x, ids, kind, activation)
        assert ids.shape == (shape[0] * shape[1], ACTIVE)
        assert relative_error(found - x, wanted - x) < TOLERANCE[order]


@pytest.mark.parametrize(("kind", "activation", "order"), cases(TAKEN, APART))
def test_experts_that_a_token_did_not_choose_are_not_read(kind: str, activation: str, order: str) -> None:
    _, engine = compiled(kind, activation, order)
    x = inputs(3, 5, seed=78)
    clean, ids = Opened(engine)(x)
    poisoned = Opened(engine)
    expert = int(ids[0, 0])
    assert poisoned.poison(expert) >= 2
    output, again = poisoned(x)
    chose = (ids == expert).any(1)
    assert torch.equal(again, ids)
    assert bool(chose.any())
    assert not bool(chose.all())
    rows, wanted = output.reshape(len(ids), -1), clean.reshape(len(ids), -1)
    assert bool(torch.isfinite(rows[~chose]).all())
    assert torch.equal(rows[~chose], wanted[~chose])
    moved = rows[chose] != wanted[chose]  # NaN, unless a later rounding turns it into a code
    assert bool(moved.any(1).all())


@pytest.mark.parametrize(("kind", "activation", "order", "operator"), [
    ("plain", "relu", "fp32", "Split"), ("gated", "silu", "fp32", "Split"), ("gated", "silu", "then int8", "QMoE"),
    ("plain", "relu", "int8 first", "MatMulIntegerToFloat"),
    pytest.param("gated", "gelu", "fp32", "Split", marks=pytest.mark.slow),
    pytest.param("gated", "gelu", "int8 first", "MatMulIntegerToFloat", marks=pytest.mark.slow),
])  # fmt: skip
def test_the_kernel_is_the_one_for_it(kind: str, activation: str, order: str, operator: str) -> None:
    _, engine = compiled(kind, activation, order)
    operators = {node.op_type for node in Opened(engine).model.graph.node}
    assert operator in operators
    assert len(operators.intersection(("MoE", "QMoE", "Split"))) == 1


@pytest.mark.parametrize(
    ("kind", "activation"), sweep([("plain", "relu"), ("gated", "silu")], [("gated", "silu")])
)
def test_very_many_experts_go_to_the_kernel_in_floats_too(kind: str, activation: str) -> None:
    program = moefied(captured_feedforward(kind, activation, neurons=80), 40, 4)
    opened = Opened(bg.compile(program, passes=[], backend="onnx"))
    x = inputs(3, 5, seed=77)
    found, ids = opened(x)
    assert "MoE" in {node.op_type for node in opened.model.graph.node}
    assert relative_error(found - x, naive_sum(program, x, ids, kind, activation) - x) < TOLERANCE["fp32"]


@pytest.mark.parametrize(("kind", "activation", "order", "operator", "count"), [
    ("plain", "relu", "int8 first", "MatMulIntegerToFloat", 2),
    pytest.param("plain", "relu", "int8 first, dynamic", "MatMulIntegerToFloat", 2, marks=pytest.mark.slow),
    # the rows of the last product are one block each: it is an integer product
    pytest.param("gated", "gelu", "then int8", "MatMulNBits", 2, marks=pytest.mark.slow),
    pytest.param("gated", "gelu", "then int8", "MatMulIntegerToFloat", 1, marks=pytest.mark.slow),
    ("gated", "gelu", "then int8 weights", "MatMulNBits", 3),
])  # fmt: skip
def test_codes_that_no_mixture_takes_are_not_gathered_for_each_token(
    kind: str, activation: str, order: str, operator: str, count: int
) -> None:
    _, engine = compiled(kind, activation, order)
    nodes = Opened(engine).model.graph.node
    products = [node for node in nodes if node.op_type == operator]
    assert len(products) == count * EXPERTS
    constants = {item.name for item in Opened(engine).model.graph.initializer}
    assert all(node.input[1] in constants for node in products)
    assert not any(node.op_type == "Gather" and node.input[0] in constants for node in nodes)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    _, engine = compiled("gated", "silu", "then int8")
    engine.save(tmp_path / "engine")
    x = inputs(2, 3, seed=5)
    assert torch.equal(bg.load(tmp_path / "engine")(x=x)["output"], engine(x=x)["output"])


@pytest.mark.parametrize(
    "later", [(Quantize("int8", activations="none"),), pytest.param((), marks=pytest.mark.slow)]
)
def test_a_program_of_two_layers_runs_for_any_number_of_tokens(
    program: Program, batches: list[dict[str, torch.Tensor]], later: tuple[Quantize, ...]
) -> None:
    parted = bg.Pipeline([MoEfy(8, 4), *later]).run(program, calibration=batches)
    engine = bg.compile(parted, backend="onnx", calibration=batches)
    for batch in (tokens(1, 3, 9), tokens(5, 11, 9)):
        assert relative_error(engine(**batch)["logits"], parted(**batch)["logits"]) < 1e-3


def _scales_too_few(model: onnx.ModelProto) -> None:
    (mixture,) = [node for node in model.graph.node if node.op_type == "QMoE"]
    mixture.attribute.append(onnx.helper.make_attribute("block_size", 16))


def _another_layout(model: onnx.ModelProto) -> None:
    (mixture,) = [node for node in model.graph.node if node.op_type == "QMoE"]
    mixture.attribute.append(onnx.helper.make_attribute("weights_prepacked", 1))


@pytest.mark.parametrize(("damage", "message"), [
    (_scales_too_few, r"has scales of shape \[4, 16\], not \[4, 16, 2\]"), (_another_layout, "sets 'weights_prepacked'"),
])  # fmt: skip
def test_a_mixture_that_would_read_beyond_its_scales_is_not_admitted(
    tmp_path: Path, damage: Any, message: str
) -> None:
    _, engine = compiled("plain", "relu", "then int8 weights")
    read = engine.files.read()
    admit(read.path, read.data, next(((name, len(data)) for name, data in read.weights.items()), None))
    model = onnx.load(str(engine.folder / MODEL_FILE))
    damage(model)
    with pytest.raises(BundleError, match=message):
        admit(tmp_path / MODEL_FILE, model.SerializeToString(), None)


@pytest.mark.parametrize(
    ("kind", "activation"), sweep([("plain", "relu"), ("gated", "silu")], [("gated", "silu")])
)
def test_the_kernel_rounds_as_the_program_says(kind: str, activation: str) -> None:
    program, engine = compiled(kind, activation, "then int8")
    roundings = [node for node in program.graph.nodes if node.target is ROUNDING]
    assert len(roundings) == 2  # gate and up share one
    x = inputs(3, 5, seed=79)
    found, expected = Opened(engine)(x)[0], next(iter(program(x=x).values()))
    assert relative_error(found, expected) < 1e-5


def test_it_rounds_by_the_largest_blocks_too() -> None:
    largest = max(TORCH.expert_blocks)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(largest, 4 * largest), nn.ReLU(), nn.Linear(4 * largest, largest))
    batches = [{"input": torch.randn(30, largest)}]
    passes = [MoEfy(EXPERTS, ACTIVE, router="random"), Quantize("int8", activations="dynamic")]
    program = bg.Pipeline(passes).run(bg.capture(model, batches[0]), calibration=batches)
    assert {node.args[1] for node in program.graph.nodes if node.target is ROUNDING} == {largest}
    engine = bg.compile(program, passes=[], backend="onnx")
    x = torch.randn(7, largest)
    # The last bit may cross a rounding step for one value among many; wrong blocks would be 1e-2 away.
    assert relative_error(engine(input=x)["output"], program(input=x)["output"]) < 1e-3


def test_rounding_by_blocks_scales_each_by_its_largest() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    x[0, :4] = 0
    found = torch.ops.bmgraph.quantize_blocks(x, 4)
    for row in range(3):
        for start in (0, 4):
            block = [float(value) for value in x[row, start : start + 4]]
            step = max(abs(value) for value in block) / 127
            wanted = [round(value / step) * step if step else 0.0 for value in block]
            assert torch.allclose(found[row, start : start + 4], torch.tensor(wanted), atol=1e-6)
