"""A trained program as a Hugging Face folder: transformers reads it, and computes the same; what it cannot hold is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import bmgraph as bg
from bmgraph.backends import SGD, Torch
from bmgraph.errors import BundleError, InputError
from bmgraph.ir.program import Program
from bmgraph.passes import LoRA, Merge, Quantize, Shrink
from tests.helpers.hf_folders import saved_folder

transformers = pytest.importorskip("transformers")
LLAMA = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 24, "vocab_size": 40, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_folder(tmp_path_factory.mktemp("hf") / "llama", "LlamaForCausalLM", LLAMA, tokenizer=True)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(24).reshape(2, 12) % 37
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.fixture(scope="module")
def program(folder: Path) -> Program:
    model = transformers.LlamaForCausalLM.from_pretrained(folder, use_cache=False)
    return bg.capture(model, batch())


def read(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def names(path: Path) -> set[str]:
    with safe_open(path / "model.safetensors", "pt") as stored:
        return set(stored.keys())


def test_a_trained_and_merged_program_is_read_by_transformers(
    folder: Path, program: Program, tmp_path: Path
) -> None:
    trainer = bg.compile(program, passes=[LoRA(r=2)], backend=Torch(optimizer=SGD(lr=0.5)))
    trainer.step(batch())
    with pytest.raises(InputError, match=r"no name for its 'model\.layers\.0\..*lora.*Merge\(\)"):
        trainer.save_pretrained(tmp_path / "unmerged", like=folder)
    merged = bg.Pipeline([Merge()]).run(trainer.program())
    merged.save_pretrained(tmp_path / "out", like=folder)
    assert names(tmp_path / "out") == names(folder)
    assert {file.name for file in folder.iterdir()} == set(os.listdir(tmp_path / "out"))
    found, first = (read(path)(**batch()).logits for path in (tmp_path / "out", folder))
    expected = merged(**batch())
    assert torch.allclose(found, list(expected.values())[1], atol=1e-5)
    assert not torch.allclose(found, first, atol=1e-3), "training has moved something"
    with pytest.raises(BundleError, match="it exists"):
        merged.save_pretrained(tmp_path / "out", like=folder)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_shrunk_program_says_its_sizes(folder: Path, program: Program, tmp_path: Path) -> None:
    smaller = bg.Pipeline([Shrink(ffn=0.5, heads=0.5)]).run(program, verify="structure")
    smaller.save_pretrained(tmp_path / "out", like=folder)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == 32
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 8)
    assert torch.allclose(
        read(tmp_path / "out")(**batch()).logits, list(smaller(**batch()).values())[1], atol=1e-5
    )


def test_what_a_folder_cannot_hold_is_refused(folder: Path, program: Program, tmp_path: Path) -> None:
    codes = bg.Pipeline([Quantize("int8", activations="none", smallest=1)]).run(program, verify="off")
    with pytest.raises(InputError, match=r"no name for its '.*_codes'"):
        codes.save_pretrained(tmp_path / "codes", like=folder)
    uneven = program.clone()
    weight = "model.layers.1.mlp.down_proj.weight"
    uneven.parameters[weight] = uneven.parameters[weight][:, :40]
    with pytest.raises(InputError, match="transformers needs layers of one size"):
        uneven.save_pretrained(tmp_path / "uneven", like=folder)
    with pytest.raises(InputError, match="give the Hugging Face folder that the model came from"):
        program.save_pretrained(tmp_path / "none", like=tmp_path)
    assert os.listdir(tmp_path) == []
