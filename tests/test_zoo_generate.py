"""Cached greedy generation on every decoder of the zoo, ragged prompts, held against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import Onnx, Torch
from bmgraph.errors import PassError
from bmgraph.passes import KVCache
from tests.test_zoo import NAMES, captured
from tests.zoo import BY_NAME, VOCABULARY

pytest.importorskip("onnxruntime")

QUICK = {("torch", "gpt2"), ("onnx", "llama")}

NEW = 32

DECODERS = [name for name in NAMES if BY_NAME[name].kind in ("decoder", "mixture of experts")]

OTHERS = {
    "encoder": "no output scores the vocabulary",
    "vision": "no output scores the vocabulary",
    "speech": "no output scores the vocabulary",
    "state space": "its sequence length is fixed",
}
"""Kind of architecture -> why generation declines it."""


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (size,), generator=generator).tolist() for size in (5, 9, 2)]


def expected(model: Any, texts: list[list[int]]) -> list[list[int]]:
    """What transformers generates, greedily, from the same prompts padded in front."""
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    model.eval()
    model.generation_config.eos_token_id = None
    found = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    rows: list[list[int]] = found[:, longest:].tolist()
    return rows


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        (backend, name) if (backend, name) in QUICK else pytest.param(backend, name, marks=pytest.mark.slow)
        for backend in ("torch", "onnx")
        for name in DECODERS
    ],
)
def test_generation_equals_that_of_transformers(backend: str, name: str) -> None:
    model, program = captured(name)
    engine = bg.compile(program, backend={"torch": Torch, "onnx": Onnx}[backend](generate=True))
    assert engine.generate(prompts(), max_new_tokens=NEW) == expected(model, prompts())


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
