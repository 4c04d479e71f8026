"""`engine.generate(input_ids=...)`: a drop-in for Hugging Face's `generate`, compared with transformers' own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import bmgraph as bg
from bmgraph.backends import Onnx, Torch
from bmgraph.errors import InputError
from bmgraph.ir.generation_defaults import GenerationDefaults
from bmgraph.ir.program import Program
from bmgraph.runtime.generation.decode_loop import pad
from bmgraph.runtime.generation.hf_call import NO_COUNTERPART
from tests.helpers.captured import captured
from tests.helpers.models import tiny_decoder, tokens
from tests.runtime.generation.test_zoo_generate import prompts, with_head

ARCHITECTURES = {"gpt2": False, "llama": False, "t5": True, "Bart": True}
"""Name -> whether it has an encoder."""

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 12},
    "length": {"max_length": 22, "min_length": 16, "no_repeat_ngram_size": 2},
    "penalised": {"max_new_tokens": 10, "repetition_penalty": 1.3, "suppress_tokens": [5, 9], "bad_words_ids": [[7], [11]]},
    "beams": {"max_new_tokens": 10, "num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.7},
    "stopping": {"max_new_tokens": 10, "num_beams": 3, "early_stopping": True, "min_new_tokens": 3},
    "defaults": {},
}  # fmt: skip


def batch(behind: bool, texts: Sequence[Sequence[int]] | None = None) -> dict[str, torch.Tensor]:
    ids, mask = pad(texts or prompts(), right=behind)
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_it_returns_what_transformers_returns(name: str) -> None:
    behind = ARCHITECTURES[name]
    model: Any
    model, program = with_head(name) if behind else captured(name)
    model.eval()
    model.generation_config.forced_eos_token_id = None
    model.generation_config.eos_token_id = None
    given = batch(behind)
    free = model.generate(**given, max_new_tokens=8, pad_token_id=0)
    end = int(free[1, -4])
    engine: Any = bg.compile(
        program, backend=Onnx(generate=True) if name in ("llama", "t5") else Torch(generate=True)
    )
    engine.generation = replace(engine.generation, eos=())  # as the model's config was changed to
    for way, options in WAYS.items():
        # 0 is no padding id to transformers' beam search, which fills up with the end instead
        filling = 1 if "num_beams" in options else 0
        for ends in ({}, {"eos_token_id": end}, {"eos_token_id": [end, 3]}):
            shared = {**given, **options, **ends, "pad_token_id": filling}
            found, expected = engine.generate(**shared), model.generate(**shared)
            assert found.dtype == torch.int64
            assert torch.equal(found, expected), (way, ends)


@pytest.fixture(scope="module")
def program() -> Program:
    return bg.capture(tiny_decoder(), tokens())


@pytest.fixture(scope="module")
def engine(program: Program) -> Any:
    return bg.compile(program, backend=Torch(generate=True))


def test_rows_of_arrays_without_a_mask(engine: Any, program: Program) -> None:
    ids = np.array([[0, 0, 3, 14], [5, 9, 2, 6]])
    alone = [engine.generate(row, max_new_tokens=5, eos=()) for row in ([3, 14], [5, 9, 2, 6])]
    found = engine.generate(input_ids=ids, max_new_tokens=5, pad_token_id=0)
    assert found.tolist() == [[*row, *new] for row, new in zip(ids.tolist(), alone)]
    whole = engine.generate(input_ids=torch.from_numpy(ids), max_length=9)  # no padding id: zeros are ids
    assert whole[0, 4:].tolist() == engine.generate([0, 0, 3, 14], max_new_tokens=5, eos=())


def test_drawn_ids_are_those_of_the_other_form(engine: Any) -> None:
    options = {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "seed": 5}
    ids = torch.tensor([[3, 14, 15]])
    found = engine.generate(
        input_ids=ids, do_sample=True, num_return_sequences=3, max_new_tokens=6, **options
    )
    answers = engine.generate([3, 14, 15], n=3, top_k=50, max_new_tokens=6, eos=(), **options)
    assert found[:, 3:].tolist() == answers
    greedy = engine.generate(
        input_ids=ids, max_new_tokens=6, **options
    )  # temperature counts with do_sample alone
    assert greedy[0, 3:].tolist() == engine.generate([3, 14, 15], max_new_tokens=6, eos=())


def test_lengths_of_the_config_and_of_the_positions(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def length(ids: torch.Tensor, **defaults: Any) -> int:
        monkeypatch.setattr(engine, "generation", GenerationDefaults(**defaults))
        return int(engine.generate(input_ids=ids).shape[1])

    ids, limit = torch.tensor([[3, 14, 15]]), engine.decoder().cache.limit
    assert length(ids) == 3 + 20
    assert length(ids, max_new_tokens=5) == 8
    assert length(ids, max_length=9) == 9
    assert length(torch.full((1, limit - 4), 7)) == limit


def test_a_stop_string_is_the_end_of_its_row(engine: Any) -> None:
    from tests.runtime.generation.test_generate import Spelling

    ids = torch.tensor([[3, 14, 15]])
    new = engine.generate([3, 14, 15], max_new_tokens=12, eos=())
    stop = Spelling().decode(new)[4:6]
    found = engine.generate(input_ids=ids, stop_strings=[stop], tokenizer=Spelling(), max_new_tokens=12)
    assert found[0, 3:].tolist() == new[: Spelling().decode(new).index(stop) + 2]


@pytest.mark.parametrize("name", NO_COUNTERPART)
def test_what_has_no_counterpart_is_refused_by_name(engine: Any, name: str) -> None:
    ids = torch.tensor([[3, 14, 15]])
    neutral = NO_COUNTERPART[name][-1]
    engine.generate(input_ids=ids, max_new_tokens=1, **{name: neutral})
    with pytest.raises(InputError, match=name):
        engine.generate(input_ids=ids, max_new_tokens=1, **{name: [object()]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_ids": [[3, 14]]}, "input_ids is a list: expected a tensor"),
        ({"input_ids": torch.tensor([3, 14])}, r"shape \[2\]"),
        ({"input_ids": torch.tensor([[3, 99]])}, "prompt 0 has id 99: the vocabulary has ids 0 to 49"),
        (
            {"attention_mask": torch.tensor([[1, 1, 0]])},
            "row 0 of attention_mask has zeros that are not in front of",
        ),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, "prompt 0 is empty"),
        ({"attention_mask": torch.tensor([[0, 2, 1]])}, "give 0 and 1 in the shape of input_ids"),
        ({"max_length": 3}, "max_length=3 leaves no token behind the 3 of input_ids"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: give at least 1"),
        ({"num_return_sequences": 2}, "give do_sample=True"),
        ({"bad_words_ids": [[3, 4]]}, "words of several ids"),
        ({"do_sample": 1}, "give True or False"),
        ({"stop_strings": "a"}, "stop strings need a tokenizer"),
        ({"eos": 3}, "eos=3 with input_ids"),
        ({"stream": True}, "stream=True with input_ids"),
        ({"prompts": [3]}, "with input_ids"),
        ({"max_newtokens": 3}, "did you mean 'max_new_tokens'"),
        ({"token_type_ids": torch.tensor([[0]])}, "no option 'token_type_ids'"),
    ],
)
def test_bad_calls_are_refused(engine: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine.generate(**{"input_ids": torch.tensor([[3, 14, 15]]), **options})
