"""The page on compression: its code runs, and what it makes is smaller."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bmgraph as bg
from bmgraph.runtime.engine_base import Engine
from tests.helpers.paths import code_of


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 200,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    ids = [torch.randint(5, 200, (4, 12)) for _ in range(4)]
    batches = [{"input_ids": item, "attention_mask": torch.ones_like(item)} for item in ids]
    names: dict[str, object] = {
        "model": BertModel(BertConfig(**sizes)).eval(),
        "decoder": LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64)).eval(),
        "batches": batches,
        "text": batches,
    }
    exec("".join(code_of("compression.md")), names)
    for name in ("engine", "small", "narrow", "turned", "student"):
        engine = names[name]
        assert isinstance(engine, Engine)
        assert engine.report.records[-1].edits
    found = bg.load(tmp_path / "student")(**batches[1])
    assert found["last_hidden_state"].shape == (4, 12, 64)
