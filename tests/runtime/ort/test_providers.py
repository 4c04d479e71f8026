"""Providers of ONNX Runtime: names, what is refused where no GPU works, and that what should lie on a device is put there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import bmgraph as bg
from bmgraph.backends import Onnx
from bmgraph.backends.onnx import backend
from bmgraph.errors import BackendError, InputError
from bmgraph.ir.program import Program
from bmgraph.passes import KVCache, Quantize
from bmgraph.runtime.ort import cache_memory, providers
from bmgraph.runtime.ort.cache_memory import CacheMemory
from bmgraph.runtime.ort.engine import OrtEngine
from bmgraph.runtime.ort.providers import CPU, CUDA, TENSORRT, check_taken, chosen_providers, device_of
from tests.helpers.captured import captured
from tests.helpers.models import tiny_decoder, tokens


def offering(*names: str) -> Any:
    return SimpleNamespace(get_available_providers=lambda: list(names))


ON_GPU = offering(TENSORRT, CUDA, CPU)


@pytest.mark.parametrize(
    ("wanted", "works", "found"),
    [
        (None, True, [CUDA, CPU]),
        (None, False, [CPU]),
        (("cpu",), True, [CPU]),
        (("cuda",), True, [CUDA, CPU]),
        (("tensorrt",), True, [TENSORRT, CUDA, CPU]),
        ((TENSORRT, "cpu"), True, [TENSORRT, CPU, CUDA]),
        ((CUDA, CPU), True, [CUDA, CPU]),
    ],
)
def test_providers_by_name_and_what_stands_behind_them(
    monkeypatch: pytest.MonkeyPatch, wanted: Any, works: bool, found: list[str]
) -> None:
    monkeypatch.setattr(providers, "gpu_works", lambda: works)
    assert chosen_providers(ON_GPU, wanted) == found


def test_what_does_not_work_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "gpu_works", lambda: False)
    with pytest.raises(BackendError, match=rf"provider '{CUDA}' runs on an NVIDIA GPU, and none works here"):
        chosen_providers(ON_GPU, ("cuda",))
    with pytest.raises(InputError, match="install onnxruntime-gpu in the place of onnxruntime"):
        chosen_providers(offering(CPU), ("tensorrt",))
    with pytest.raises(InputError, match=r"give a tuple of names, such as \('cuda',\)"):
        chosen_providers(ON_GPU, "cuda")
    check_taken(("cuda",), [CUDA, CPU], [CUDA, CPU])
    check_taken(None, [CUDA, CPU], [CPU])
    with pytest.raises(BackendError, match=rf"could not load provider '{CUDA}', and would run on {CPU}"):
        check_taken(("cuda",), [CUDA, CPU], [CPU])


def test_a_compile_for_a_gpu_where_there_is_none_is_one_error(program: Program) -> None:
    if providers.gpu_works():
        pytest.skip("this machine has a GPU")
    with pytest.raises((InputError, BackendError), match=r"not available|none works here"):
        bg.compile(program, backend=Onnx(providers=("cuda",)))


def test_the_device_is_that_of_the_kernels() -> None:
    assert device_of([TENSORRT, CPU]) == device_of([CUDA, CPU]) == "cuda"
    assert device_of([CPU]) == device_of(["AzureExecutionProvider", CPU]) == "cpu"


class Value:
    """An OrtValue that remembers its device."""

    def __init__(self, array: np.ndarray, device: str) -> None:
        self.array, self.device = array, device

    @staticmethod
    def ortvalue_from_numpy(array: np.ndarray, device: str) -> Value:
        return Value(array, device)

    def numpy(self) -> np.ndarray:
        return self.array


class Binding:
    """A binding that remembers where inputs and outputs are bound."""

    def __init__(self) -> None:
        self.inputs: dict[str, str] = {}
        self.outputs: dict[str, str] = {}

    def bind_ortvalue_input(self, name: str, value: Value) -> None:
        self.inputs[name] = value.device

    def bind_output(self, name: str, device: str) -> None:
        self.outputs[name] = device


def test_a_cache_stays_on_the_device_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = bg.Pipeline([KVCache()]).run(bg.capture(tiny_decoder(), tokens()))
    assert decoder.cache is not None
    cache = decoder.cache.spec(decoder)
    monkeypatch.setattr(cache_memory, "import_onnxruntime", lambda: SimpleNamespace(OrtValue=Value))
    memory = CacheMemory(cache, 2, "cuda", 64)
    binding = Binding()
    memory.bind(binding, 3, 0)
    pasts = {slot.past.name for slot in cache.slots}
    presents = {slot.present.name for slot in cache.slots}
    assert binding.inputs == dict.fromkeys(pasts, "cuda")
    assert binding.outputs == dict.fromkeys(presents, "cuda")
    slot = cache.slots[0]
    shape = [3 if axis == slot.axis else size for axis, size in enumerate(slot.empty_shape(2, 0))]
    memory.keep([Value(np.ones(shape, np.float32), "cuda") for _ in pasts])
    memory.reorder(np.array([1, 0]))
    memory.forget(1)
    memory.bind(binding, 1, 0)
    assert binding.inputs == dict.fromkeys(pasts, "cuda")


def test_a_run_where_tensors_lie_gives_what_a_run_on_arrays_does(program: Program) -> None:
    """The device is the host's memory: bindings by address without a GPU."""
    engine: OrtEngine = bg.compile(program, backend="onnx")
    batch = tokens(3, 7)
    found = engine.run_placed(batch, torch.device("cpu"))
    assert found is not None
    for name, value in engine(**batch).items():
        assert torch.equal(found[name], value)
    with pytest.raises(InputError):
        engine.run_placed({}, torch.device("cpu"))
    turned = {name: value.T.contiguous().T for name, value in batch.items()}
    again = engine.run_placed(turned, torch.device("cpu"))
    assert again is not None
    assert all(torch.equal(again[name], value) for name, value in engine(**batch).items())


def test_the_report_says_what_a_gpu_does_not_compute(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "runs_on_cpu", lambda providers: False)
    notes = bg.compile(program, [Quantize("int8", activations="dynamic")]).report.notes
    assert any("DynamicQuantizeLinear" in note and "no kernel on a GPU" in note for note in notes)


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_on_a_gpu_outputs_are_where_inputs_are(program: Program, provider: str) -> None:
    try:
        engine: Any = bg.compile(program, backend=Onnx(providers=(provider,)))
    except (InputError, BackendError) as error:
        pytest.skip(f"not run: {error}")
    on_host = engine(**tokens())
    on_gpu = engine(**{name: value.cuda() for name, value in tokens().items()})
    for name, value in program(**tokens()).items():
        assert on_host[name].device.type == "cpu"
        assert on_gpu[name].device.type == "cuda"
        torch.testing.assert_close(on_host[name], value, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(on_gpu[name].cpu(), value, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_on_a_gpu_a_decoder_generates_what_the_program_does() -> None:
    _, program = captured("llama")
    try:
        engine: Any = bg.compile(program, backend=Onnx(providers=("cuda",), generate=True))
    except (InputError, BackendError) as error:
        pytest.skip(f"not run: {error}")
    reference: Any = bg.compile(program, backend=Onnx(providers=("cpu",), generate=True))
    prompts = ([3, 14, 15], [9])
    assert engine.generate(prompts, max_new_tokens=8) == reference.generate(prompts, max_new_tokens=8)
