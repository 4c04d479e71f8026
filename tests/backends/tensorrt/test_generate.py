"""Decoders on TensorRT: built without a GPU; what their plan computes is compared on ONNX Runtime, which has the same operators."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

import bmgraph as bg
from bmgraph.backends import TensorRT, Torch
from bmgraph.backends.tensorrt.cache_in_place import append_in_place
from bmgraph.backends.tensorrt.legalize import lower
from bmgraph.errors import BackendError, InputError
from bmgraph.ir.program import Program
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.passes import KVCache, Quantize
from bmgraph.runtime.ort.bundle import MODEL_FILE
from bmgraph.runtime.tensorrt.decoder import TensorRTDecoder, run_with_room
from bmgraph.runtime.tensorrt.engine import TensorRTEngine
from tests.helpers.captured import captured
from tests.helpers.models import tiny_decoder, tokens

if not (find_spec("tensorrt") or find_spec("tensorrt_rtx")):
    pytest.skip("neither tensorrt nor tensorrt-rtx is installed", allow_module_level=True)

PROMPTS = ([3, 14, 15, 9, 26, 5], [35], [8, 9, 7])


class OnCpu:
    """The model of a plan on ONNX Runtime's CPU, with the memory of a session of TensorRT."""

    def __init__(self, model: ir.Model, folder: Path) -> None:
        import onnxruntime

        for node in model.graph.all_nodes():
            node.attributes.pop("TRT_decomposable", None)
        ir.save(model, str(folder / MODEL_FILE))
        self._session = onnxruntime.InferenceSession(folder / MODEL_FILE, providers=["CPUExecutionProvider"])
        self._taken = {item.name for item in self._session.get_inputs()}

    def run(
        self,
        batch: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.dtype],
        placed: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        given = {name: value.numpy() for name, value in batch.items() if name in self._taken}
        found = {
            name: torch.from_numpy(value)
            for name, value in zip(outputs, self._session.run(list(outputs), given))
        }
        for name, memory in (placed or {}).items():
            memory.copy_(found[name])
        return found


@pytest.fixture(scope="module")
def decoder() -> Program:
    return bg.Pipeline([KVCache()]).run(bg.capture(tiny_decoder(), tokens()))


@pytest.fixture(scope="module")
def engine(decoder: Program) -> TensorRTEngine:
    return bg.compile(decoder, backend=TensorRT(generate=True))


def on_cpu(program: Program, engine: TensorRTEngine, folder: Path, longest_step: int = 64) -> TensorRTDecoder:
    """The decoder of an engine whose plan's model runs on the CPU."""
    served = deployed(program)
    model = lower(served)
    assert served.cache is not None
    append_in_place(model, served.cache, engine.room)
    found = engine.decoder()
    assert found is not None
    session = OnCpu(model, folder)
    return TensorRTDecoder(found.cache, lambda: session, "cpu", engine.room, longest_step)


def test_the_cache_is_updated_in_place(engine: TensorRTEngine) -> None:
    assert engine.layers["kv_cache_update"] == 4
    assert engine.cache is not None
    assert all(slot.in_place for slot in engine.cache.slots)
    assert engine.room == 40
    assert "the KV cache has room for 40 positions" in str(engine.report)
    assert "sequence 1 to 40 (opt 1)" in str(engine.report)


@pytest.mark.parametrize("longest_step", [64, 4])
def test_its_model_goes_on_as_the_program_does(
    engine: TensorRTEngine,
    decoder: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    longest_step: int,
) -> None:
    reference: Any = bg.compile(decoder, backend=Torch(generate=True))
    monkeypatch.setattr(engine, "_decoder", on_cpu(decoder, engine, tmp_path, longest_step))
    for options in ({}, {"num_beams": 3}, {"temperature": 0.9, "seed": 3}):
        shared: dict[str, Any] = {"max_new_tokens": 12, "eos": (), **options}
        assert engine.generate(PROMPTS, **shared) == reference.generate(PROMPTS, **shared)
    with pytest.raises(InputError, match="more than the 40 positions"):
        engine.generate(PROMPTS, max_new_tokens=35)


def test_a_call_without_room_runs_on_a_copy_that_has(
    engine: TensorRTEngine, decoder: Program, tmp_path: Path
) -> None:
    made = on_cpu(decoder, engine, tmp_path)
    dtypes = {spec.name: spec.dtype for spec in engine.outputs}
    found = run_with_room(made._session(), made.cache, decoder.example, dtypes, engine.room, "cpu")
    for name, value in decoder(**decoder.example).items():
        torch.testing.assert_close(found[name], value)


def test_without_a_gpu_generate_says_so(engine: TensorRTEngine) -> None:
    if not engine.unable:
        pytest.skip("this machine has the GPU")
    with pytest.raises(BackendError, match="this machine has no CUDA GPU"):
        engine.generate([3, 14])
    with pytest.raises(InputError, match="keeps the cache itself"):
        engine.submit([3, 14])
    with pytest.raises(InputError, match="has id 99"):
        engine.generate([99])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_architectures_build(name: str, scheme: str, tmp_path: Path) -> None:
    _, program = captured(name)
    passes = (
        [Quantize(scheme, activations="none", **({"group": 16} if scheme == "int4" else {}))]
        if scheme
        else []
    )
    engine: Any = bg.compile(program, passes, backend=TensorRT(generate=True), max_drift=2.0)
    assert engine.layers["kv_cache_update"] == len(engine.cache.slots)
    if not scheme:
        cached = bg.Pipeline([KVCache()]).run(program)
        reference: Any = bg.compile(cached, backend=Torch(generate=True))
        engine._decoder = on_cpu(cached, engine, tmp_path)
        shared: dict[str, Any] = {"max_new_tokens": 12, "eos": ()}
        assert engine.generate(PROMPTS, **shared) == reference.generate(PROMPTS, **shared)


@pytest.mark.slow
def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(BackendError, match="beside the graph 'encoder', which gives its memories"):
        bg.compile(captured("t5")[1], backend=TensorRT(generate=True))


@pytest.mark.gpu
def test_an_engine_generates_what_its_program_does(engine: TensorRTEngine, decoder: Program) -> None:
    if engine.unable:
        pytest.skip(f"not run: {engine.unable}")
    reference: Any = bg.compile(decoder, backend=Torch(generate=True))
    assert engine.generate(PROMPTS, max_new_tokens=12) == reference.generate(PROMPTS, max_new_tokens=12)
