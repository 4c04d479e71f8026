"""Beam search: against all texts of a length, and against transformers' own on architectures with a cache."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.runtime.generation.decode_loop import pad
from tests.helpers.captured import captured
from tests.helpers.models import tiny_decoder, tokens
from tests.runtime.generation.test_zoo_generate import BACKENDS, DECODERS, prompts, with_head

PROMPTS = ([3, 14, 15, 9, 26, 5], [35])
VOCABULARY = 50

ENDS = {"greedy": False, "first": True, "never": "never"}


@pytest.fixture(scope="module")
def decoder() -> Program:
    return bg.capture(tiny_decoder(), tokens())


@pytest.fixture(scope="module", params=list(BACKENDS))
def engine(request: pytest.FixtureRequest, decoder: Program) -> Any:
    return bg.compile(decoder, backend=BACKENDS[request.param](generate=True))


def log_probabilities(program: Program, rows: list[list[int]]) -> torch.Tensor:
    """f64[rows, V] of what comes next."""
    ids = torch.tensor(rows)
    logits = program(ids=ids, attention_mask=torch.ones_like(ids))["output"][:, -1]
    return logits.double().log_softmax(-1)


def all_pairs(program: Program, prompt: list[int], end: int, penalty: float) -> list[list[int]]:
    """All texts of two new ids, or of one that `end` ends, by their worth: the best first."""
    first = log_probabilities(program, [prompt])[0]
    second = log_probabilities(program, [[*prompt, item] for item in range(VOCABULARY)])
    found = [(float(first[end]), [])] if end < VOCABULARY else []
    for one, two in product(range(VOCABULARY), repeat=2):
        if one != end:
            worth = float(first[one] + second[one, two]) / 2**penalty
            found.append((worth, [one] if two == end else [one, two]))
    return [text for _, text in sorted(found, key=lambda item: -item[0])]


@pytest.mark.parametrize(("end", "penalty"), [(VOCABULARY, 1.0), (7, 0.0), (7, 1.5)])
def test_with_as_many_beams_as_ids_it_finds_the_best(
    engine: Any, decoder: Program, end: int, penalty: float
) -> None:
    ends = (end,) if end < VOCABULARY else ()
    options = {"num_beams": VOCABULARY, "length_penalty": penalty, "early_stopping": "never", "eos": ends}
    found = engine.generate(PROMPTS, max_new_tokens=2, n=6, **options)
    assert found == [all_pairs(decoder, list(prompt), end, penalty)[:6] for prompt in PROMPTS]
    assert engine.generate(PROMPTS[0], max_new_tokens=2, **options) == found[0][0]


def test_beams_are_better_than_greedy_and_keep_penalties(engine: Any, decoder: Program) -> None:
    def worth(prompt: tuple[int, ...], text: list[int]) -> float:
        rows = [[*prompt, *text[:place]] for place in range(len(text))]
        return math.fsum(float(log_probabilities(decoder, [row])[0, item]) for row, item in zip(rows, text))

    prompt = (3, 14, 15)
    greedy = engine.generate(list(prompt), max_new_tokens=8, eos=())
    found = engine.generate(list(prompt), max_new_tokens=8, num_beams=5, eos=())
    assert worth(prompt, found) >= worth(prompt, greedy)
    for text in engine.generate(
        list(prompt), max_new_tokens=8, num_beams=4, n=4, no_repeat_ngram_size=1, eos=()
    ):
        assert len({*prompt, *text}) == len(prompt) + 8
    assert list(engine.generate(list(prompt), max_new_tokens=8, num_beams=5, eos=(), stream=True)) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams=0: give a whole number"),
        ({"num_beams": 2, "n": 3}, "n=3 of num_beams=2"),
        ({"num_beams": 2, "temperature": 0.5}, "does not sample"),
        ({"num_beams": 2, "speculate": True}, "reads no guesses"),
        ({"num_beams": 2, "length_penalty": math.inf}, "give a finite number"),
        ({"num_beams": 2, "early_stopping": "soon"}, "give True, False or 'never'"),
    ],
)
def test_bad_options_are_refused(engine: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine.generate(PROMPTS[0], **options)


def expected(model: Any, texts: list[list[int]], behind: bool, **options: Any) -> list[list[list[int]]]:
    """transformers' beam search of each prompt alone, without the ids that end texts."""
    model.eval()
    results = []
    for text in texts:
        ids, mask = (torch.from_numpy(item) for item in pad([text], right=behind))
        model.generation_config.forced_eos_token_id = None
        found = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0, **options
        )
        rows = found[:, 1 if behind else ids.shape[1] :].tolist()
        end = options["eos_token_id"]
        results.append([row[: row.index(end)] if end in row else row for row in rows])
    return results


@pytest.mark.slow
@pytest.mark.parametrize("stopping", list(ENDS))
@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("name", [*DECODERS, "t5", "Bart"])
def test_it_is_that_of_transformers(backend: str, name: str, stopping: str) -> None:
    behind = name not in DECODERS
    model, program = with_head(name) if behind else captured(name)
    engine = bg.compile(program, backend=BACKENDS[backend](generate=True))
    end = engine.generate(prompts()[:1], max_new_tokens=10, eos=())[0][4]
    shared = {"num_beams": 4, "length_penalty": 0.7, "early_stopping": ENDS[stopping]}
    found = engine.generate(prompts(), max_new_tokens=10, eos=end, n=3, **shared)
    assert found == expected(model, prompts(), behind, num_return_sequences=3, eos_token_id=end, **shared)
