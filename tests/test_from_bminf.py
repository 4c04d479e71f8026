"""The code of docs/from_bminf.md runs: an encoder-decoder in int8 from a folder, within a limit of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.paths import code_of


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    monkeypatch.chdir(tmp_path)
    (code,) = code_of("from_bminf.md")
    torch.manual_seed(0)
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "vocab_size": 600}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    model.save_pretrained(tmp_path / "folder")
    ids = torch.arange(1, 15).reshape(2, 7)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :5]}
    names: dict[str, Any] = {"batch": batch, "question": [3, 14, 15, 9]}
    exec(code, names)
    assert 0 < len(names["filled"]) <= 8
    engine = names["engine"]
    assert engine.program.memory == 32_000_000
    assert any("predicted peak" in line for line in engine.report.notes)
