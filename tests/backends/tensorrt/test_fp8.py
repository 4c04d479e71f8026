"""fp8 on TensorRT: the network has e4m3 weights and activations, is built for GPUs that multiply them, and nothing else takes them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import OpenVINO, TensorRT
from bmgraph.backends.tensorrt.legalize import lower
from bmgraph.errors import BackendError, InputError, PassError
from bmgraph.ir.program import Program
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.passes import LoRA, Merge, MoEfy, Prune, Quantize, Shrink
from tests.helpers.captured import captured
from tests.helpers.models import tokens
from tests.helpers.tensorrt import distance, parsed

if not (find_spec("tensorrt") or find_spec("tensorrt_rtx")):
    pytest.skip("neither tensorrt nor tensorrt-rtx is installed", allow_module_level=True)

E4M3 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    return [
        {"input": torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))} for seed in range(3)
    ]


@pytest.fixture(scope="module")
def plain() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    return bg.capture(model, {"input": torch.randn(3, 64)})


def rounded(program: Program, batches: Any, mode: str = "static", *more: Any) -> Program:
    return bg.Pipeline([*more, Quantize("fp8", activations=mode)]).run(
        program, calibration=batches, target=TensorRT.target
    )


@pytest.mark.parametrize(("mode", "codes"), [("static", 4), ("none", 2)])
def test_the_network_has_fp8_weights_and_activations(
    plain: Program, batches: Any, tmp_path: Path, mode: str, codes: int
) -> None:
    form = rounded(plain, batches, mode)
    assert {value.dtype for name, value in form.parameters.items() if name.endswith("_codes")} == {E4M3}
    model = lower(deployed(form))
    network = parsed(model, tmp_path)
    trt, layers = (
        network.trt,
        [network.network.get_layer(place) for place in range(network.network.num_layers)],
    )
    read = [
        layer for layer in layers
        if layer.type == trt.LayerType.DEQUANTIZE and layer.get_input(0).dtype == trt.DataType.FP8
    ]  # fmt: skip
    assert len(read) == codes
    assert distance(model, form, batches, tmp_path) < 1e-5


def test_it_is_built_for_gpus_that_multiply_fp8(plain: Program, batches: Any) -> None:
    engine: Any = bg.compile(plain, [Quantize("fp8")], backend="tensorrt", calibration=batches)
    assert engine.hardware.capabilities
    assert all(tuple(map(int, name.split("."))) >= (8, 9) for name in engine.hardware.capabilities)
    (record,) = engine.report.records
    assert {edit.what for edit in record.edits} == {"fp8 weight, static activation"}
    if "8.0" in bg.compile(plain, backend="tensorrt").hardware.capabilities:
        with pytest.raises(InputError, match=r"GPUs of capability 8\.0 do not multiply fp8"):
            bg.compile(plain, [Quantize("fp8")], backend=TensorRT(capabilities=("8.0",)), calibration=batches)


def test_every_code_is_the_nearest_and_fills_its_scale(plain: Program, batches: Any) -> None:
    form = rounded(plain, batches)
    for name in ("0.weight", "2.weight"):
        codes, scale = form.parameters[f"{name}_codes"], form.parameters[f"{name}_scale"]
        grid = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
        grid = grid[grid.isfinite()].double()
        wanted = plain.parameters[name].double() / scale.double()[:, None]
        nearest = (wanted[..., None] - grid).abs().amin(-1)
        assert float(((codes.double() - wanted).abs() - nearest).max()) < 1e-4
        assert codes.float().abs().amax(1).eq(448).all()


def test_other_targets_say_why_they_have_none(plain: Program, batches: Any) -> None:
    for backend, reason in (
        ("onnx", "ONNX Runtime's CPU kernels decode all weights at every call"),
        (OpenVINO(), "OpenVINO makes such weights float32 when it compiles"),
        ("torch", "its product on the CPU takes longer than with float32"),
    ):
        if backend != "onnx" and not isinstance(backend, str) and find_spec("openvino") is None:
            continue
        with pytest.raises(PassError, match=rf"has no kernel for fp8: {reason}; take TensorRT, or int8"):
            bg.compile(plain, [Quantize("fp8")], backend=backend, calibration=batches)
    made = rounded(plain, batches)
    for backend in ("onnx", *(["openvino"] if find_spec("openvino") else [])):
        with pytest.raises(
            BackendError,
            match=r"0\.weight_codes is fp8, for which .* has no kernel: take the backend tensorrt",
        ):
            bg.compile(made, backend=backend)
    for options in ({"group": 32}, {"method": "gptq"}, {"activations": "dynamic"}, {"symmetric": False}):
        with pytest.raises(InputError, match="fp8"):
            Quantize("fp8", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_saturates_and_passes_gradients_within_its_range(dtype: torch.dtype) -> None:
    x = torch.tensor([-1e4, -3.3, -0.001, 0.0, 0.2, 17.0, 449.0], dtype=dtype, requires_grad=True)
    scale, zero = torch.tensor(0.5, dtype=dtype), torch.zeros((), dtype=E4M3)
    found = torch.ops.bmgraph.quantize_static(x, scale, zero)
    expected = (x.detach() / 0.5).clamp(-448, 448).to(E4M3).to(dtype) * 0.5
    assert torch.equal(found, expected)
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_masks_deltas_and_files_go_on(plain: Program, batches: Any, tmp_path: Path) -> None:
    form = rounded(plain, batches, "static", Prune("2:4"))
    model = lower(deployed(form))
    assert distance(model, form, batches, tmp_path) < 1e-5
    form.save(tmp_path / "saved")
    loaded: Any = bg.load(tmp_path / "saved")
    for name, value in form(**batches[0]).items():
        assert torch.equal(loaded(**batches[0])[name], value)
    tuned = bg.Pipeline([LoRA(r=2, targets="all-linear")]).run(rounded(plain, batches, "none"))
    merged = bg.Pipeline([Merge(requantize=0.2)]).run(tuned, target=TensorRT.target)
    assert merged.parameters["0.weight_codes"].dtype is E4M3


@pytest.mark.slow
def test_a_shrunk_model_of_such_codes_builds_and_experts_are_refused(
    plain: Program, batches: Any, tmp_path: Path
) -> None:
    made = rounded(plain, batches)
    experts = bg.Pipeline([MoEfy(experts=8, active=4)]).run(made, calibration=batches, target=TensorRT.target)
    with pytest.raises(BackendError, match=r"0\.weight.*: TensorRT does not support experts in fp8"):
        bg.compile(experts, backend="tensorrt")
    form = bg.Pipeline([Shrink(ffn=0.25)]).run(made, calibration=batches, target=TensorRT.target)
    assert distance(lower(deployed(form)), form, batches, tmp_path) < 1e-5
    assert bg.compile(form, backend="tensorrt").layers["dequantize"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["static", "none"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_architectures_build(name: str, mode: str, tmp_path: Path) -> None:
    from tests.helpers.zoo import BY_NAME

    _, program = captured(name)
    batch = BY_NAME[name].example(2, 12)
    engine: Any = bg.compile(
        program, [Quantize("fp8", activations=mode)], backend="tensorrt", calibration=[batch], max_drift=1.0
    )
    assert engine.layers["dequantize"] >= len(program.structure().linears) - len(
        engine.report.records[-1].declined
    )
    if name in ("llama", "gpt2"):
        cached: Any = bg.compile(
            program, [Quantize("fp8", activations="none")], backend=TensorRT(generate=True), max_drift=1.0
        )
        assert cached.layers["kv_cache_update"] == len(cached.cache.slots)


@pytest.mark.gpu
def test_on_a_gpu_it_computes_what_the_program_does(program: Program) -> None:
    engine: Any = bg.compile(program, [Quantize("fp8")], backend="tensorrt", calibration=[tokens()])
    if engine.unable:
        pytest.skip(f"not run: {engine.unable}")
    assert engine.report.engine_drift < 0.1
