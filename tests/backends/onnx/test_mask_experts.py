"""All experts at once, masked, where products per expert would take longer: the same function, and the report says so."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch

import bmgraph as bg
from bmgraph.backends import Onnx
from bmgraph.backends.onnx import mask_experts
from bmgraph.ir.program import Program
from bmgraph.passes import MoEfy, Quantize
from bmgraph.runtime.ort.bundle import MODEL_FILE
from bmgraph.verify.metrics import relative_error
from tests.helpers.feedforwards import calibration, captured_feedforward, inputs
from tests.helpers.sweep import sweep

pytest.importorskip("onnxruntime")

GROUP, EXPERTS, DRIFT = 16, 4, 2.0


def operators(engine: Any) -> list[str]:
    graph = onnx.load(str(engine.folder / MODEL_FILE), load_external_data=False).graph
    return [node.op_type for node in graph.node]


def coded(kind: str, activation: str, moefy: MoEfy, **options: Any) -> Program:
    item = Quantize("int4", group=GROUP, site_drift=DRIFT, **options)
    return bg.Pipeline([moefy, item]).run(
        captured_feedforward(kind, activation), calibration=calibration(), target=Onnx.target, max_drift=DRIFT
    )


CASES: dict[str, tuple[str, str, MoEfy, dict[str, Any]]] = {
    "plain": ("plain", "gelu", MoEfy(EXPERTS, 2), {}),
    "gated": ("gated", "silu", MoEfy(EXPERTS, 3), {}),
    "fused": ("fused", "silu", MoEfy(EXPERTS, 2), {}),
    "zero points": ("gated", "gelu", MoEfy(EXPERTS, 1), {"symmetric": False}),
    "codes alone": ("plain", "relu", MoEfy(EXPERTS, 2), {"activations": "none"}),
    "threshold": ("gated", "silu", MoEfy(EXPERTS, 3, threshold=0.5), {}),
    "shared": ("plain", "relu", MoEfy(EXPERTS, 2, shared=1), {}),
}


@pytest.mark.parametrize("case", sweep(list(CASES), ["gated"]))
def test_it_is_the_same_function(case: str) -> None:
    kind, activation, moefy, options = CASES[case]
    program = coded(kind, activation, moefy, **options)
    engine = bg.compile(program, passes=[], backend="onnx")
    for shape in ((1, 1), (1, 2), (1, 7), (2, 4), (64, 1), (8, 25)):
        x = inputs(*shape, seed=5)
        assert relative_error(engine(x=x)["output"] - x, program(x=x)["output"] - x) < 1e-3
    found = operators(engine)
    assert "Split" not in found
    assert found.count("MatMulNBits") == (3 if kind == "gated" else 4 if kind == "fused" else 2) - (
        kind == "fused"
    )
    (note,) = [item for item in engine.report.notes if item.startswith("experts")]
    assert "computed whole and masked" in note
    assert "nothing is saved" in note


def test_large_experts_keep_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    program = coded("plain", "relu", MoEfy(EXPERTS, 1))
    monkeypatch.setattr(mask_experts, "WEIGHTS", 1e9)
    engine = bg.compile(program, passes=[], backend="onnx")
    assert operators(engine).count("MatMulNBits") == 2 * EXPERTS
    assert engine.report.notes == []


@pytest.mark.parametrize(
    ("experts", "active", "pays"),
    [(16, 4, True), (16, 8, True), (32, 8, True), (64, 16, False), (16, 12, False)],
)
def test_products_pay_where_they_were_measured_to(experts: int, active: int, pays: bool) -> None:
    """Feed-forwards of 1024 and 4096 in int4 on one thread: 1.4, 0.9 (1.1 with 8 tokens), 0.9 (1.2), 0.5 and 0.7 of the dense speed."""
    neurons = 4096 // experts
    graph = torch.fx.Graph()

    def made(*shape: int) -> Any:
        node = graph.get_attr("w")
        node.meta["val"] = torch.empty(shape, device="meta")
        return node

    ids = made(1, active)
    codes = made(experts, neurons, 32, 16), made(experts, 1024, neurons // 32, 16)
    up = graph.call_function(print, (None, codes[0], None, ids, None, 4, 1024, True))
    down = graph.call_function(print, (up, codes[1], None, ids, None, 4, neurons, True))
    assert mask_experts._pays(mask_experts._Products(down, {up: (up, None)}, [], None)) == pays
