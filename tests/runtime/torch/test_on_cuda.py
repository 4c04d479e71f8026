"""Torch engines on a CUDA device: what they give on the host, within a limit of the device's memory where one is set."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import bmgraph as bg
from bmgraph.backends import Torch
from bmgraph.errors import BackendError, BundleError, InputError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.passes import Deltas, LoRA, MoEfy, Prune, Quantize, Stream
from bmgraph.runtime.torch.engine import TorchEngine
from bmgraph.verify.metrics import relative_error
from tests.helpers.deltas import trained
from tests.helpers.models import TinyDecoder, tiny_decoder, tiny_encoder, tokens

pytestmark = pytest.mark.gpu
DEVICE = "cuda:0"
PROMPTS = [[3, 14, 15, 9, 26, 5], [35], [8, 9, 7]]
MADE: dict[str, tuple[ModelPass, ...]] = {
    "plain": (),
    "int8": (Quantize("int8", activations="none"),),
    "int4": (Quantize("int4", group=16),),
    "int3": (Quantize("int3", group=16),),
    "pruned": (Prune("2:4"),),
    "experts": (MoEfy(experts=8, active=4),),
}
MB = 2**20
SIZES = {"width": 768, "hidden": 3072, "layers": 6, "vocabulary": 30_000, "longest": 128}
"""355 MB: 92 MB each of a table and a head, 28 MB a layer."""
LIMIT = 220 * MB


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def decoder() -> Program:
    return bg.capture(tiny_decoder(), tokens(), prove=False)


@pytest.mark.parametrize("made", MADE)
def test_outputs_and_tokens_of_the_host(decoder: Program, made: str) -> None:
    program = bg.Pipeline(MADE[made]).run(decoder, calibration=[tokens(4, 9, 1)])
    backend = Torch(generate=True)
    host, there = bg.compile(program, backend=backend), bg.compile(program.to(DEVICE), backend=backend)
    for batch in (tokens(3, 8), tokens(1, 1), tokens(2, 20)):
        found = there(**batch)["output"]
        assert found.device == torch.device(DEVICE)
        assert relative_error(found.cpu(), host(**batch)["output"]) < 1e-5
    options: list[dict[str, Any]] = [
        {},
        {"num_beams": 3},
        {"temperature": 0.8, "top_k": 9, "seed": 5},
        {"n": 2, "temperature": 1.0, "seed": 1},
    ]
    for given in options:
        expected = host.generate(PROMPTS, max_new_tokens=12, **given)
        assert there.generate(PROMPTS, max_new_tokens=12, **given) == expected, given


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_on_the_host(dtype: torch.dtype) -> None:
    model = tiny_encoder()
    program = bg.capture(tiny_encoder().to(dtype), tokens(), prove=False)
    there = bg.compile(program.to(DEVICE), backend=Torch())
    batch = tokens(4, 12, 3)
    found, host = there(**batch), program(**batch)
    for name, expected in bg.capture(model, tokens(), prove=False)(**batch).items():
        distance = relative_error(host[name].float(), expected)
        assert relative_error(found[name].float().cpu(), expected) < 2 * distance + 1e-4, name


def test_requests_join_and_leave_a_batch(decoder: Program) -> None:
    prompts = [[3, 14, 15, 9, 26, 5], [35], [8, 9, 7], [1, 2], [9, 9, 9, 9]]
    expected = bg.compile(decoder, backend=Torch(generate=True)).generate(prompts, max_new_tokens=10)
    there = bg.compile(decoder.to(DEVICE), backend=Torch(generate=True))
    made = [there.submit(prompt, max_new_tokens=10) for prompt in prompts]
    assert [list(item.result(60).ids) for item in made] == expected


def test_deltas_by_row_are_exchanged(decoder: Program, tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two")):
        trained(bg.Pipeline([LoRA(r=4)]).run(decoder), seed=number).save_delta(tmp_path / name)
    resources = {name: str(tmp_path / name) for name in ("one", "two")}

    def engine(program: Program) -> TorchEngine:
        return bg.compile(
            program, [Deltas(("one",), capacity=8)], backend=Torch(generate=True), resources=resources
        )

    host, there = engine(decoder), engine(decoder.to(DEVICE))
    for both in (host, there):
        both.deltas.add("two", resources["two"])
    rows = ["one", "two", None]
    assert there.generate(PROMPTS, delta=rows, max_new_tokens=8) == host.generate(
        PROMPTS, delta=rows, max_new_tokens=8
    )


def test_by_inductor(decoder: Program) -> None:
    for passes in ((), MADE["int4"]):
        host = bg.compile(decoder, passes, backend=Torch(generate=True), verify="off")
        there = bg.compile(
            decoder.to(DEVICE), passes, backend=Torch(generate=True, torch_compile=True), verify="off"
        )
        for batch in (tokens(3, 8), tokens(2, 13), tokens(1, 1)):
            assert relative_error(there(**batch)["output"].cpu(), host(**batch)["output"]) < 1e-5
        assert there.generate(PROMPTS, max_new_tokens=8) == host.generate(PROMPTS, max_new_tokens=8)


@pytest.mark.parametrize("form", ["program", "devices", "compiled"])
def test_steps_of_one_token_are_recorded(decoder: Program, form: str) -> None:
    expected = bg.compile(decoder, backend=Torch(generate=True)).generate(PROMPTS, max_new_tokens=30)
    backend = Torch(
        generate=True, devices=DEVICE if form == "devices" else (), torch_compile=form == "compiled"
    )
    there = bg.compile(decoder if form == "devices" else decoder.to(DEVICE), backend=backend, verify="off")
    assert there.generate(PROMPTS, max_new_tokens=30) == expected
    steps = there.decoder().steps
    assert steps.fixed.refused == ""
    assert steps.fixed._idle
    before = torch.cuda.memory_allocated()
    assert there.generate(PROMPTS, max_new_tokens=30) == expected
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**16


@pytest.mark.parametrize("devices", [("cuda:0",), ("cuda:0", "cpu"), ("cpu", "cuda:0")])
def test_divided_among_a_device_and_the_host(decoder: Program, devices: tuple[str, ...]) -> None:
    host = bg.compile(decoder, backend=Torch(generate=True))
    there = bg.compile(decoder, backend=Torch(generate=True, devices=devices))
    for batch in (tokens(3, 8), tokens(1, 1)):
        assert relative_error(there(**batch)["output"].cpu(), host(**batch)["output"]) < 1e-5
    assert there.generate(PROMPTS, max_new_tokens=8) == host.generate(PROMPTS, max_new_tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    save_file(TinyDecoder(**SIZES).state_dict(), made / "model.safetensors")
    return made


def _meta() -> TinyDecoder:
    with torch.device("meta"):
        return TinyDecoder(**SIZES).eval()


@pytest.fixture(scope="module")
def large(folder: Path) -> Program:
    return bg.capture(_meta(), tokens(2, 16), weights=folder, prove=False)


@pytest.fixture(scope="module")
def there(large: Program) -> Program:
    """The same program, whole on the device."""
    return bg.capture(_loaded(large), tokens(2, 16), prove=False).to(DEVICE)


def _loaded(large: Program) -> TinyDecoder:
    model = TinyDecoder(**SIZES).eval()
    model.load_state_dict({name: large.tensor(name).clone() for name in model.state_dict()})
    return model


def _streamed(program: Program, limit: int = LIMIT, *passes: ModelPass, **options: Any) -> TorchEngine:
    return bg.compile(
        program, [*passes, Stream(limit)], backend=Torch(devices=DEVICE, **options), verify="off"
    )


def _peak(call: Any, *given: Any, **named: Any) -> tuple[Any, int]:
    """What a call gives (of an engine its output), and the most bytes that tensors took on the device while it ran."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    found = call(*given, **named)
    torch.cuda.synchronize()
    return found["output"] if isinstance(found, dict) else found, torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("bits", ["float", "int8"])
def test_weights_are_read_ahead_within_a_limit_of_the_device(
    large: Program, there: Program, bits: str
) -> None:
    passes = () if bits == "float" else (Quantize("int8", activations="none"),)
    limit = LIMIT if bits == "float" else 160 * MB
    expected = bg.Pipeline(passes).run(there, verify="off") if passes else there
    before = torch.cuda.memory_allocated()
    engine = _streamed(large, limit, *passes)
    schedule = engine.schedule(**tokens(2, 16))
    assert schedule.read > 0
    assert f"to {DEVICE}" in str(schedule)
    for batch in (tokens(2, 16), tokens(1, 1), tokens(3, 40), tokens(2, 16)):
        (found, peak), reference = _peak(engine, **batch), expected(**batch)["output"]
        assert found.device == torch.device(DEVICE)
        assert relative_error(found, reference) < 1e-5
        assert peak - before <= limit, (peak - before) / MB


def test_calls_on_other_streams_and_one_after_the_other_do_not_meet(large: Program, there: Program) -> None:
    engine, batch = _streamed(large), tokens(2, 16)
    expected = there(**batch)["output"]
    found = []
    for number in range(6):
        with torch.cuda.stream(torch.cuda.Stream() if number % 2 else torch.cuda.default_stream()):
            found.append(engine(**batch)["output"])
    torch.cuda.synchronize()
    assert all(relative_error(item, expected) < 1e-5 for item in found)


def test_generation_within_a_limit_of_the_device(large: Program, there: Program) -> None:
    plain = bg.compile(there, backend=Torch(generate=True), verify="off")
    engine = _streamed(large, LIMIT, generate=True)
    before = torch.cuda.memory_allocated()
    found, peak = _peak(engine.generate, PROMPTS, max_new_tokens=8)
    assert found == plain.generate(PROMPTS, max_new_tokens=8)
    assert peak - before <= LIMIT
    with pytest.raises(InputError, match="needs at least"):
        engine.generate([PROMPTS[0]] * 4000, max_new_tokens=60)


def test_the_smallest_limit_of_the_device_that_an_error_names_is_enough(
    large: Program, there: Program
) -> None:
    with pytest.raises(BackendError, match="needs at least") as caught:
        _streamed(large, 20 * MB)
    least = int(str(caught.value).partition("needs at least ")[2].split()[0].replace(",", ""))
    engine = _streamed(large, least)
    batch = tokens(2, 16)
    assert relative_error(engine(**batch)["output"], there(**batch)["output"]) < 1e-5
    with pytest.raises(BackendError, match=r"has [\d,]+ left"):
        _streamed(large, 10**15)


def test_a_file_that_is_cut_is_an_error_and_the_next_engine_runs(
    folder: Path, large: Program, tmp_path: Path
) -> None:
    copied = tmp_path / "weights"
    copied.mkdir()
    file = copied / "model.safetensors"
    file.write_bytes((folder / "model.safetensors").read_bytes())
    engine = _streamed(bg.capture(_meta(), tokens(2, 16), weights=copied, prove=False))
    with open(file, "r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    with pytest.raises(BundleError, match="altered"):
        engine(**tokens(2, 16))
    assert _streamed(large)(**tokens(2, 16))["output"].isfinite().all()


def test_a_program_that_is_on_the_device_is_told_where_to_name_it(decoder: Program) -> None:
    with pytest.raises(BackendError, match=r"Torch\(devices='cuda:0'\)"):
        bg.compile(decoder.to(DEVICE), [Stream(LIMIT)], backend=Torch(), verify="off")
    with pytest.raises(BackendError, match="runs on one device"):
        bg.compile(decoder, [Stream(LIMIT)], backend=Torch(devices=(DEVICE, "cpu")), verify="off")
