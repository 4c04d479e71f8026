"""Experts in codes of 4 bits and fewer: the nearest codes, verified, on torch and on ONNX Runtime, refused elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import bmgraph as bg
from bmgraph.backends import Onnx, OpenVINO
from bmgraph.backends.onnx import mask_experts
from bmgraph.errors import BackendError, OrderError, PassError, VerificationError
from bmgraph.ir.program import Program
from bmgraph.ops.block_codes import unpack_codes
from bmgraph.passes import LoRA, Merge, MoEfy, Prune, Quantize
from bmgraph.passes.quantize.block_codes import BlockCodes
from bmgraph.runtime.ort.bundle import MODEL_FILE
from bmgraph.verify.metrics import relative_error
from tests.helpers.captured import batches, captured
from tests.helpers.feedforwards import calibration, captured_feedforward, inputs, moefied
from tests.helpers.sweep import sweep
from tests.helpers.zoo import BY_NAME

pytest.importorskip("onnxruntime")

GROUP = 16
DRIFT = 2.0
"""Random toys lose much to few bits."""


@pytest.fixture(scope="module", autouse=True)
def products_per_expert() -> Iterator[None]:
    """Toys have a product per expert, as large experts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_experts, "WEIGHTS", 1e9)
        yield


def naive(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """A weight [E, O, I] at its nearest codes, a block at a time."""
    made = torch.empty_like(weight)
    for expert, output in torch.cartesian_prod(*map(torch.arange, weight.shape[:2])).tolist():
        for start in range(0, weight.shape[2], GROUP):
            block = weight[expert, output, start : start + GROUP]
            scale = block[block.abs().argmax()] / -(2 ** (bits - 1))
            codes = (block / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            made[expert, output, start : start + GROUP] = codes * scale
    return made


@cache
def dense(kind: str, activation: str) -> Program:
    return moefied(captured_feedforward(kind, activation), 4, 2)


@cache
def coded(kind: str, activation: str, scheme: str, activations: str) -> Program:
    """A MoEfied feed-forward in codes of groups."""
    item = Quantize(scheme, group=GROUP, activations=activations, site_drift=DRIFT)
    return bg.Pipeline([item]).run(dense(kind, activation), target=Onnx.target, max_drift=DRIFT)


def test_codes_are_the_nearest_of_each_block() -> None:
    program = coded("plain", "relu", "int4", "none")
    for name in ("up.weight", "down.weight"):
        weight = dense("plain", "relu").parameters[name]
        codes, scale = program.parameters[f"{name}_codes"], program.parameters[f"{name}_scale"]
        assert codes.dtype == torch.uint8
        assert tuple(codes.shape) == (*weight.shape[:2], weight.shape[2] // GROUP, GROUP // 2)
        assert codes.numel() == weight.numel() // 2
        found = unpack_codes(codes, 4, weight.shape[2]) * scale.repeat_interleave(GROUP, -1)
        assert torch.equal(found, naive(weight, 4))
        assert name not in program.parameters


@pytest.mark.parametrize("scheme", sweep(["int4", "int2", "int8", "int3"], ["int4"]))
@pytest.mark.parametrize(
    ("kind", "activation"),
    sweep([("plain", "gelu"), ("gated", "silu"), ("fused", "silu")], [("gated", "silu")]),
)
def test_the_program_computes_with_dequantized_weights(kind: str, activation: str, scheme: str) -> None:
    item = Quantize(scheme, group=GROUP, activations="none", site_drift=DRIFT)
    program = bg.Pipeline([item]).run(dense(kind, activation), max_drift=DRIFT)
    plain = dense(kind, activation).clone()
    sites = {edit.site for edit in program.history[-1].edits}
    assert sites == {name for name in plain.parameters if plain.tensor(name).dim() == 3}
    with plain.edit() as editor:
        for name in sites:
            editor.assign(name, naive(plain.tensor(name), int(scheme[3:])))
    x = inputs(3, 5, seed=3)
    assert relative_error(program(x=x)["output"], plain(x=x)["output"]) < 1e-6


@pytest.mark.parametrize(
    ("kind", "activation", "scheme", "activations"),
    sweep(
        [
            (*kind, scheme, mode)
            for kind in (("plain", "gelu"), ("gated", "silu"))
            for scheme in ("int4", "int2", "int8")
            for mode in ("blocks", "none")
        ],
        [("gated", "silu", "int4", "blocks")],
    ),
)
def test_onnx_runtime_multiplies_the_codes(
    kind: str, activation: str, scheme: str, activations: str, tmp_path: Path
) -> None:
    program = coded(kind, activation, scheme, activations)
    engine = bg.compile(program, passes=[], backend="onnx")
    tolerance = 1e-3  # a value may cross a step of its rounding
    for shape in ((1, 1), (1, 2), (1, 7), (2, 4), (64, 1), (8, 25)):
        x = inputs(*shape, seed=7)
        found, expected = engine(x=x)["output"] - x, program(x=x)["output"] - x
        assert relative_error(found, expected) < tolerance
    same = inputs(1, 1, seed=7).expand(3, 4, -1).contiguous()  # all tokens choose the same experts
    assert relative_error(engine(x=same)["output"], program(x=same)["output"]) < tolerance
    engine.save(tmp_path / "engine")
    assert torch.equal(bg.load(tmp_path / "engine")(x=x)["output"], engine(x=x)["output"])
    model = onnx.load(str(engine.folder / MODEL_FILE), load_external_data=False)
    constants = {item.name: item for item in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == (3 if kind == "gated" else 2) * 4
    assert all(constants[node.input[1]].data_type == onnx.TensorProto.UINT8 for node in products)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_native_mixtures_with_a_delta(name: str) -> None:
    _, program = captured(name)
    given = batches(BY_NAME[name])
    passes = [Quantize("int4", group=GROUP, site_drift=DRIFT), LoRA(r=2, alpha=4)]
    program = bg.Pipeline(passes).run(program, calibration=given, max_drift=DRIFT, target=Onnx.target)
    said = {edit.site: edit.what for edit in program.history[-2].edits}
    stacks = [site for site in said if ".experts." in site]
    assert len(stacks) == 4
    assert not any(site.endswith("gate.weight") for site in said if "shared" not in site)
    engine = bg.compile(program, passes=[], backend="onnx", example=program.example)
    for batch in given:
        expected = program(**batch)
        for key, value in engine(**batch).items():
            assert relative_error(value, expected[key]) < 1e-2


@pytest.mark.slow
def test_calibrated_methods_give_experts_the_nearest_codes() -> None:
    _, program = captured("mixtral")
    given = batches(BY_NAME["mixtral"])
    item = Quantize("int4", method="gptq", group=GROUP, site_drift=DRIFT)
    done = bg.Pipeline([item]).run(program, calibration=given, max_drift=DRIFT)
    said = {edit.site: edit.what for edit in done.history[-1].edits}
    assert {("by gptq" in what) for site, what in said.items() if ".experts." in site} == {False}
    assert {("by gptq" in what) for site, what in said.items() if ".self_attn." in site} == {True}


@pytest.mark.slow
def test_masked_experts_keep_their_zeros() -> None:
    passes: list[Any] = [Prune("2:4"), Quantize("int4", group=GROUP, site_drift=DRIFT)]
    program = bg.Pipeline(passes).run(dense("plain", "relu"), target=Onnx.target, max_drift=DRIFT)
    engine = bg.compile(program, passes=[], backend="onnx")
    x = inputs(2, 3, seed=5)
    assert relative_error(engine(x=x)["output"], program(x=x)["output"]) < 1e-3


def test_a_target_without_a_kernel_declines_them() -> None:
    with pytest.raises(PassError, match=r"up\.weight: openvino has no kernel for experts in such int4 codes"):
        bg.Pipeline([Quantize("int4", group=GROUP)]).run(dense("plain", "relu"), target=OpenVINO.target)
    with pytest.raises(PassError, match="openvino has no kernel"):
        bg.Pipeline([Quantize("int8", group=GROUP)]).run(dense("plain", "relu"), target=OpenVINO.target)


@pytest.mark.parametrize("backend", ["openvino", pytest.param("tensorrt", marks=pytest.mark.slow)])
def test_an_engine_without_a_kernel_refuses_them(backend: str) -> None:
    with pytest.raises(BackendError, match=r"up\.weight"):
        bg.compile(coded("plain", "relu", "int4", "none"), passes=[], backend=backend, verify="off")


def test_a_history_from_before_declines_them_again() -> None:
    before = Onnx.target.at("2")
    assert not BlockCodes(4, GROUP).takes_experts(before)
    assert BlockCodes(4, GROUP).takes_experts(Onnx.target)
    assert not BlockCodes(3, GROUP).takes_experts(Onnx.target)


def test_codes_that_are_not_the_nearest_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    nearest = BlockCodes.nearest
    monkeypatch.setattr(BlockCodes, "nearest", lambda self, *given: nearest(self, *given).roll(1, -1))
    with pytest.raises(VerificationError, match=r"up\.weight"):
        bg.Pipeline([Quantize("int4", group=GROUP, site_drift=9.0)]).run(
            dense("plain", "relu"), max_drift=9.0
        )


@pytest.mark.slow
def test_they_follow_moefication_alone() -> None:
    with pytest.raises(OrderError, match=r"try this order: passes=\[moefy"):
        bg.Pipeline([Quantize("int4", group=GROUP), MoEfy(4, 1)]).run(
            captured_feedforward("plain", "relu"), calibration=calibration()
        )


@pytest.mark.slow
def test_a_delta_merges_around_them() -> None:
    passes: list[Any] = [
        Quantize("int4", group=GROUP, site_drift=DRIFT),
        LoRA(r=2, alpha=4),
        Merge(requantize=0.5),
    ]
    _, program = captured("mixtral")
    done = bg.Pipeline(passes).run(program, max_drift=DRIFT)
    assert any("_codes" in name and ".experts." in name for name in done.parameters)


@pytest.mark.parametrize("activations", sweep(["blocks", "none"], ["blocks"]))
def test_codes_of_experts_may_have_zero_points(activations: str) -> None:
    item = Quantize("int4", group=GROUP, activations=activations, site_drift=DRIFT, symmetric=False)
    program = bg.Pipeline([item]).run(dense("gated", "silu"), target=Onnx.target, max_drift=DRIFT)
    assert program.parameters["up.weight_zero"].dim() == 3
    x = inputs(3, 5, seed=5)
    assert relative_error(program(x=x)["output"], dense("gated", "silu")(x=x)["output"]) < 0.2
    engine = bg.compile(program, passes=[], backend="onnx")
    assert relative_error(engine(x=x)["output"], program(x=x)["output"]) < 1e-3
