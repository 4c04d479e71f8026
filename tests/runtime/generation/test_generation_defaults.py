"""`generate` starts, ends and pads as the model's own generation config says, also from a saved engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import Onnx, Torch
from bmgraph.errors import BundleError, InputError
from bmgraph.ir.generation_defaults import GenerationDefaults
from bmgraph.ir.program import Program
from bmgraph.passes import KVCache
from tests.helpers.bundles import edit_json, sign
from tests.helpers.hf_folders import T5, saved_folder
from tests.helpers.models import tiny_decoder, tokens

PROMPTS = ([3, 14, 15, 9, 26, 5], [35], [8, 9, 7])


@pytest.fixture(scope="module")
def decoder() -> Program:
    return bg.Pipeline([KVCache()]).run(bg.capture(tiny_decoder(), tokens()))


def with_defaults(program: Program, **defaults: Any) -> Any:
    changed = program.clone()
    changed.generation = GenerationDefaults(**defaults)
    return bg.compile(changed, backend=Torch(generate=True))


def test_texts_end_at_the_ids_and_lengths_of_the_config(decoder: Program) -> None:
    whole = bg.compile(decoder, backend=Torch(generate=True)).generate(PROMPTS[0], max_new_tokens=12)
    ends = (whole[4], whole[7])
    assert (
        with_defaults(decoder, eos=ends).generate(PROMPTS[0], max_new_tokens=12)
        == whole[: whole.index(ends[0])]
    )
    assert with_defaults(decoder, eos=ends).generate(PROMPTS[0], max_new_tokens=12, eos=()) == whole
    assert with_defaults(decoder, max_new_tokens=5).generate(PROMPTS[0]) == whole[:5]
    assert with_defaults(decoder, max_length=10).generate(PROMPTS[0]) == whole[:4]
    with pytest.raises(
        InputError, match=r"has 6 tokens, and the model's generation config allows 6 .* give max_new_tokens"
    ):
        with_defaults(decoder, max_length=6).generate(PROMPTS[0])


def test_the_config_of_a_model_is_read_and_what_engines_do_not_do_is_told() -> None:
    model: Any = tiny_decoder()

    class Config:
        eos_token_id = [7, 9]
        pad_token_id = -1
        decoder_start_token_id = None
        bos_token_id = 4
        max_length = 20
        num_beams = 4
        do_sample = False

    model.generation_config = Config()
    program = bg.capture(model, tokens())
    wanted = GenerationDefaults(start=4, eos=(7, 9), max_length=20, unserved=("num_beams=4",))
    assert program.generation == wanted
    engine = bg.compile(program, backend=Torch(generate=True))
    assert engine.generation == wanted
    assert "asks for num_beams=4; engines decode greedily" in engine.report.notes[0]


def test_a_saved_engine_and_a_saved_program_keep_it(decoder: Program, tmp_path: Path) -> None:
    changed = decoder.clone()
    changed.generation = GenerationDefaults(
        start=4, eos=(7, 9), pad=3, max_new_tokens=5, unserved=("num_beams=4",)
    )
    changed.save(str(tmp_path / "program"))
    loaded: Program = bg.load(tmp_path / "program")
    assert loaded.generation == changed.generation
    bg.compile(loaded, backend=Onnx(generate=True)).save(tmp_path / "engine")
    engine = bg.load(tmp_path / "engine")
    assert engine.generation == changed.generation
    assert len(engine.generate(PROMPTS, eos=())[0]) == 5
    edit_json(
        tmp_path / "engine" / "manifest.json", lambda manifest: manifest["generation"].update(eos="all")
    )
    sign(tmp_path / "engine")
    with pytest.raises(BundleError, match="the ids that end a text are 'all'"):
        bg.load(tmp_path / "engine")


def test_an_encoder_decoder_starts_as_its_folder_says_or_as_it_shifts_labels(tmp_path: Path) -> None:
    import transformers

    saved_folder(tmp_path, "T5ForConditionalGeneration", T5)
    model: Any = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    ids = torch.randint(5, 40, (3, 6))
    program = bg.capture(
        model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, :4]}
    )
    assert program.generation == GenerationDefaults(start=5, eos=(3,), pad=0)
    program.generation = replace(program.generation, start=None)
    engine = bg.compile(program, backend=Torch(generate=True))
    assert engine.generation == GenerationDefaults(start=5, eos=(3,), pad=0)
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)[:, 1:]
    for found, row in zip(engine.generate(ids, max_new_tokens=6), expected.tolist()):
        assert found == (row[: row.index(3)] if 3 in row else row)
