"""Models whose attention sees a window of positions alone, in all layers or some: ids far beyond it are those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import Onnx, OpenVINO, Torch
from bmgraph.runtime.generation.decode_loop import pad

transformers = pytest.importorskip("transformers")

WINDOW, NEW = 6, 24
PROMPTS = [[5, 9, 11, 7, 5, 9, 33, 60, 41], [12, 5], [5, 9, 11, 7, 5]]

SIZES: dict[str, Any] = {
    "vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": WINDOW,
}  # fmt: skip
BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
NEO = {
    "vocab_size": 80, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
    "window_size": WINDOW, "attention_types": [[["global", "local"], 1]],
}  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma3": ("Gemma3TextConfig", {**SIZES, **BOTH, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "Cohere2": ("Cohere2Config", {**SIZES, **BOTH}),
    "Starcoder2": ("Starcoder2Config", SIZES),
    "Phi3": ("Phi3Config", {**SIZES, "pad_token_id": 0}),
    "Qwen2": ("Qwen2Config", {**SIZES, "use_sliding_window": True, "max_window_layers": 1}),
    "Qwen3": ("Qwen3Config", {**SIZES, "head_dim": 8, "use_sliding_window": True, "max_window_layers": 0}),
    "Mixtral": ("MixtralConfig", {**SIZES, **EXPERTS}),
    "GptOss": ("GptOssConfig", {**SIZES, **EXPERTS, "head_dim": 8}),
    "SmolLM3": ("SmolLM3Config", {**SIZES, "use_sliding_window": True, "pad_token_id": 0}),
    "Ministral": ("MinistralConfig", {**SIZES, "head_dim": 8}),
    "Exaone4": ("Exaone4Config", {**SIZES, "head_dim": 8, "sliding_window_pattern": 2}),
    "GPTNeo": ("GPTNeoConfig", NEO),
}


def built(name: str) -> Any:
    """A model with weights large enough that a mistake in a mask is visible."""
    config, sizes = MODELS[name]
    if not hasattr(transformers, config):
        pytest.skip(f"transformers {transformers.__version__} has no {config}")
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, config)(**sizes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            spread = 0.15 if parameter.dim() > 1 else 0.05
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    made.set_attn_implementation("eager")
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = None, 0
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_ids_beyond_the_window_are_those_of_transformers(name: str) -> None:
    model = built(name)
    ids, mask = (torch.from_numpy(item) for item in pad(PROMPTS))
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    expected = whole[:, ids.shape[1] :].tolist()
    program = bg.capture(model, {"input_ids": ids, "attention_mask": mask})
    pytest.importorskip("openvino")
    for backend in (Torch(generate=True), Onnx(generate=True), OpenVINO(generate=True)):
        engine = bg.compile(program, backend=backend)
        assert engine.generate(PROMPTS, max_new_tokens=NEW) == expected, backend
        assert [engine.generate(prompt, max_new_tokens=NEW) for prompt in PROMPTS] == expected, backend
        requests = [engine.submit(prompt, max_new_tokens=NEW) for prompt in PROMPTS]
        assert [list(request.result(120).ids) for request in requests] == expected, backend
        engine.stop_batching()
