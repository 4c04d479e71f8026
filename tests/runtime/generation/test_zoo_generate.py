"""Cached greedy generation on every decoder of the zoo with ragged prompts, compared with transformers' `generate`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import Onnx, OpenVINO, Torch
from bmgraph.errors import BundleError, InputError, PassError
from bmgraph.ir.generation_defaults import GenerationDefaults
from bmgraph.ir.program import Program
from bmgraph.passes import KVCache
from bmgraph.runtime.generation.decode_loop import pad
from tests.helpers.bundles import edit_json, sign
from tests.helpers.captured import NAMES, captured
from tests.helpers.zoo import BART_LIKE, BY_NAME, VOCABULARY, _build, text_pair

pytest.importorskip("onnxruntime")

QUICK = {("torch", "gpt2"), ("onnx", "llama"), ("torch", "t5")}

FEW, NEW = 12, 32
"""New tokens in a quick test and in a slow one; attention windows have 8 positions."""

DECODERS = [name for name in NAMES if BY_NAME[name].kind in ("decoder", "mixture of experts")]

OTHERS = {
    "encoder": "no output scores the vocabulary",
    "vision": "no output scores the vocabulary",
    "speech": "no output scores the vocabulary",
    "state space": "its sequence length is fixed",
}
"""Kind of architecture -> why it cannot generate."""


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (size,), generator=generator).tolist() for size in (5, 9, 2)]


def padded(texts: list[list[int]], behind: bool = False) -> dict[str, Any]:
    """A greedy call of transformers' `generate` for prompts, padded left (`behind`: right, for an encoder)."""
    ids, mask = (torch.from_numpy(item) for item in pad(texts, right=behind))
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW, "pad_token_id": 0}


def expected(model: Any, texts: list[list[int]], behind: bool = False) -> torch.Tensor:
    """What transformers returns for the same prompts."""
    model.eval()
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    found: torch.Tensor = model.generate(**padded(texts, behind), do_sample=False)
    return found


BACKENDS: dict[str, Any] = {
    "torch": Torch,
    "onnx": Onnx,
    **({"openvino": OpenVINO} if find_spec("openvino") else {}),
}


def cases(names: list[str]) -> list[Any]:
    """Every backend with every name; all but a few are marked slow."""
    return [
        (backend, name) if (backend, name) in QUICK else pytest.param(backend, name, marks=pytest.mark.slow)
        for backend in BACKENDS
        for name in names
    ]


@pytest.mark.parametrize(("backend", "name"), cases(DECODERS))
def test_generation_equals_that_of_transformers(backend: str, name: str) -> None:
    model, program = captured(name)
    engine = bg.compile(program, backend=BACKENDS[backend](generate=True))
    whole, call = expected(model, prompts()), padded(prompts())
    assert (
        engine.generate(prompts(), max_new_tokens=NEW, eos=())
        == whole[:, call["input_ids"].shape[1] :].tolist()
    )
    assert torch.equal(engine.generate(**call, eos_token_id=[]), whole)


def with_head(name: str) -> tuple[Any, Program]:
    """An encoder-decoder with a language model head, also for zoo models that lack one."""
    if name in BY_NAME:
        return captured(name)
    torch.manual_seed(0)
    model = _build(f"{name}ForConditionalGeneration", f"{name}Config", **BART_LIKE)
    return model, bg.capture(model, text_pair(2, 12))


@pytest.mark.parametrize(("backend", "name"), cases(["t5", "t5_gated", "Bart", "MBart", "Pegasus"]))
def test_an_encoder_is_read_once_and_its_decoder_goes_on(backend: str, name: str, tmp_path: Path) -> None:
    model, program = with_head(name)
    start = model.config.decoder_start_token_id
    engine = bg.compile(program, backend=BACKENDS[backend](generate=True))
    found = engine.generate(prompts(), max_new_tokens=NEW, start=start, eos=())
    whole = expected(model, prompts(), behind=True)
    assert found == whole[:, 1:].tolist()
    assert torch.equal(engine.generate(**padded(prompts(), behind=True), eos_token_id=[]), whole)
    assert (
        engine.generate(prompts(), max_new_tokens=NEW, eos=()) == found
    )  # the model's config says where to start
    engine.generation = GenerationDefaults()
    with pytest.raises(InputError, match="says what its decoder starts with: give that id, as in start=0"):
        engine.generate(prompts())
    with pytest.raises(InputError, match="prompt 1 is empty"):
        engine.generate([[5], []], start=start)
    engine.save(tmp_path / "saved")
    loaded = bg.load(tmp_path / "saved")
    if backend == "torch":
        assert str(loaded) == str(engine.program)
        loaded = bg.compile(loaded, backend="torch")
    assert loaded.generate(prompts(), max_new_tokens=NEW, start=start, eos=()) == found
    file, reason = {
        "torch": ("program.json", "a signature each"),
        "onnx": ("manifest.json", "does not describe 'encoder.graph.onnx'"),
    }["torch" if backend == "torch" else "onnx"]
    edit_json(tmp_path / "saved" / file, lambda tree: tree["graphs"].pop("encoder") and None)
    sign(tmp_path / "saved")
    with pytest.raises(BundleError, match=reason):
        bg.load(tmp_path / "saved")


@pytest.mark.parametrize(
    "name",
    [name if name in ("llama", "gpt2") else pytest.param(name, marks=pytest.mark.slow) for name in DECODERS],
)
def test_roles_stay(name: str) -> None:
    _, program = captured(name)
    assert bg.Pipeline([KVCache()]).run(program).structure().roles == program.structure().roles


@pytest.mark.parametrize(
    "name",
    [
        name if name == "bert" else pytest.param(name, marks=pytest.mark.slow)
        for name in NAMES
        if BY_NAME[name].kind in OTHERS
    ],
)
def test_others_decline_with_a_reason(name: str) -> None:
    with pytest.raises(PassError, match=OTHERS[BY_NAME[name].kind]):
        bg.Pipeline([KVCache()]).run(captured(name)[1])
