"""A choice among given texts: the result is one of them, the likeliest id by id, alone, in a batch and among requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmgraph.errors import InputError
from bmgraph.runtime.generation.batching.options import Batching
from tests.helpers.counting_decoder import IDS, CountingEngine, next_scores

END = 19


def likeliest(prompt: Sequence[int], choices: Sequence[Sequence[int]]) -> list[int]:
    """What a greedy choice gives, by scoring each id that goes on with a choice."""
    chosen: list[int] = []
    while True:
        going = [item for item in choices if list(item[: len(chosen)]) == chosen]
        allowed = [item[len(chosen)] if len(item) > len(chosen) else END for item in going]
        text = [*prompt, *chosen]
        scores = next_scores([value for place, item in enumerate(text) for value in (item, place)], 0)
        best = max(set(allowed), key=lambda item: float(scores[item]))
        if best == END:
            return chosen
        chosen.append(best)


CHOICES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=12)


@settings(max_examples=30)
@given(CHOICES, st.lists(st.lists(st.integers(0, 18), min_size=1, max_size=5), min_size=1, max_size=4))
def test_the_result_is_the_likeliest_choice_id_by_id(choices: Any, prompts: Any) -> None:
    engine = CountingEngine()
    expected = [likeliest(prompt, choices) for prompt in prompts]
    assert engine.generate(prompts, choices=choices, max_new_tokens=8, eos=END) == expected
    engine.batching = Batching(rows=2)
    made = [engine.submit(prompt, choices=choices, max_new_tokens=8, eos=END) for prompt in prompts]
    assert [list(item.result(30).ids) for item in made] == expected
    assert {item.finish_reason for item in made} == {"stop"}
    engine.stop_batching()


def test_draws_are_in_proportion() -> None:
    engine, prompt, choices = CountingEngine(), [3, 1], [[4], [7], [7, 2]]
    drawn = engine.generate(
        prompt, choices=choices, max_new_tokens=4, eos=END, temperature=1.0, n=600, seed=0
    )
    found = Counter(map(tuple, drawn))
    assert set(found) == set(map(tuple, choices))
    weights = np.exp(next_scores([3, 0, 1, 1], 0)[[4, 7]])
    assert abs(found[4,] / 600 - weights[0] / weights.sum()) < 0.08


class Letters:
    """A tokenizer with one token per letter."""

    eos_ids = (END,)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    encode_plain = encode

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(item + ord("a")) for item in ids if item != END)


def test_texts_streams_and_scores() -> None:
    engine = CountingEngine()
    engine.tokenizer = Letters()
    choices = ["cab", "car", "dog", "do"]
    found = engine.generate(["a", "bb"], choices=choices)
    assert set(found) <= set(choices)
    assert "".join(engine.generate("a", choices=choices, stream=True)) == found[0]
    answer = engine.submit("a", choices=choices, logprobs=1).result(30)
    assert (answer.text, answer.finish_reason, len(answer.scores)) == (found[0], "stop", len(found[0]))
    forbidden = {Letters().encode(found[0])[0]: -np.inf}
    assert engine.generate("a", choices=choices, logit_bias=forbidden)[0] != found[0][0]
    engine.stop_batching()


@pytest.mark.parametrize(
    ("choices", "options", "message"),
    [
        ("cat", {}, "choices='cat': give a list of 1 to 4096 texts"),
        ([], {}, r"choices=\[\]: give a list"),
        ([""], {}, "choice 0 is '': give a text that is not empty"),
        (["a", 3], {}, "choice 1 is 3: give a text"),
        (["~"], {}, "choice 0 holds what is no id of the 20 of this model"),
        (["abcd"], {"max_new_tokens": 4}, "choice 0 has 4 ids, and with what ends it more than max_new_tokens=4"),
        (["a"], {"eos": ()}, "choices need an id that ends a text"),
        (["ab"], {"eos": 1}, "choice 0 holds an id that ends a text"),
        (["a"], {"num_beams": 2}, "choices or json with num_beams or speculate: leave one of them out"),
        (["a"], {"logit_bias": {0: -np.inf}}, "the penalties leave none of the choices"),
        (["a" * 60] * 4096, {"max_new_tokens": 61}, None),
        (["ab" * 300] * 500, {"max_new_tokens": 61}, "choice 0 has 600 ids"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(choices: Any, options: Any, message: str | None) -> None:
    engine = CountingEngine(limit=None)
    engine.tokenizer = Letters()
    if message is None:
        assert engine.generate("b", choices=choices, **options) == choices[0]
        return
    with pytest.raises(InputError, match=message):
        engine.generate("b", choices=choices, **options)
    if "num_beams" not in options:
        with pytest.raises(InputError, match=message):
            engine.submit("b", choices=choices, **options).result(30)
    engine.stop_batching()


def test_without_a_tokenizer_choices_are_ids() -> None:
    engine = CountingEngine()
    for wrong in ([IDS], ["a"], [1.5]):
        with pytest.raises(InputError, match="choice 0"):
            engine.generate([1], choices=[wrong], eos=END)
