"""Cached greedy generation after each pass: on both engines equal to the same program without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.passes import LoRA, Prune, Quantize, Shrink
from bmgraph.verify.metrics import relative_error
from tests.helpers.captured import captured
from tests.helpers.deltas import trained
from tests.helpers.sweep import sweep
from tests.runtime.generation.test_zoo_generate import BACKENDS, FEW, NEW, prompts

pytest.importorskip("onnxruntime")

MEMBERS: dict[str, Pass] = {
    "lora": LoRA(r=4),
    "int8": Quantize("int8", activations="none"),
    "shrink": Shrink(ffn=0.25, heads=0.5, scope="global"),
    "prune": Prune(),
}

QUICK = {
    ("lora", "torch", "llama"),
    ("int8", "onnx", "t5"),
    ("shrink", "onnx", "llama"),
    ("prune", "torch", "gpt2"),
}


@cache
def made(member: str, name: str) -> Program:
    """A toy after a pass; deltas get nonzero values."""
    program = bg.Pipeline([MEMBERS[member]]).run(captured(name)[1], max_drift=2.0)
    return trained(program) if member == "lora" else program


def start_of(name: str) -> int | None:
    """The start id of an encoder-decoder's outputs; None for a decoder."""
    start: int | None = getattr(captured(name)[0].config, "decoder_start_token_id", None)
    return start


def without_cache(program: Program, prompt: Sequence[int], start: int | None, new: int) -> list[int]:
    """Greedy generation that recomputes the whole text for every token; `start` is an encoder-decoder's start id."""
    given = torch.tensor([prompt])
    written = list(prompt) if start is None else [start]
    before = len(written)
    for _ in range(new):
        text = torch.tensor([written])
        batch = {"input_ids": text} if start is None else {"input_ids": given, "decoder_input_ids": text}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        written.append(int(program(**batch)["logits"][0, -1].argmax()))
    return written[before:]


@pytest.mark.parametrize(
    ("member", "backend", "name"),
    sweep(((m, b, n) for m in MEMBERS for b in BACKENDS for n in ("llama", "gpt2", "t5")), QUICK),
)
def test_it_goes_on_as_the_program_without_a_cache(member: str, backend: str, name: str) -> None:
    new = FEW if (member, backend, name) in QUICK else NEW
    program, (_, before) = made(member, name), captured(name)
    moved = relative_error(program(**before.example)["logits"], before(**before.example)["logits"])
    assert moved > 1e-3
    start = start_of(name)
    engine = bg.compile(program, backend=BACKENDS[backend](generate=True))
    options: dict[str, Any] = {"eos": ()} if start is None else {"eos": (), "start": start}
    found = engine.generate(prompts(), max_new_tokens=new, **options)
    assert found == [without_cache(program, prompt, start, new) for prompt in prompts()]
