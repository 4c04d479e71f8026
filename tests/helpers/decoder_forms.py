"""Decoders whose caches have different forms, as engines that generate."""

from __future__ import annotations

from typing import Any

import bmgraph as bg
from bmgraph.backends import Onnx, Torch
from bmgraph.passes import SoftPrompt
from bmgraph.runtime.generation.batching.options import Batching
from tests.helpers.deltas import trained
from tests.helpers.models import tiny_decoder, tokens
from tests.helpers.rotary_decoder import rotary_decoder

FORMS = ("learned positions", "window", "bias", "soft prompt")


def engine_of_form(name: str, backend: str) -> Any:
    """The engine of one of `FORMS`, on "onnx" or "torch", with small batches for `submit`."""
    model = {"window": lambda: rotary_decoder(window=3), "bias": lambda: rotary_decoder(bias=True)}.get(
        name, tiny_decoder
    )
    program = bg.capture(model(), tokens())
    if name == "soft prompt":  # whose cache grows on ONNX Runtime
        program = trained(bg.Pipeline([SoftPrompt(3)]).run(program), size=1.0)
    made = bg.compile(program, backend=Onnx(generate=True) if backend == "onnx" else Torch(generate=True))
    made.batching = Batching(rows=5, prefill=7)
    return made
