"""Choosing ids: logits that are not finite, tiny temperatures, and options that are no whole numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import bmgraph as bg
from bmgraph.backends import Torch
from bmgraph.errors import BackendError, InputError
from bmgraph.runtime.generation.penalties import PenalisedRow, Penalties
from bmgraph.runtime.generation.sampling import SMALL, Sampler, Sampling, _head
from tests.helpers.models import tiny_decoder, tokens


@pytest.fixture(scope="module")
def engine() -> Any:
    return bg.compile(tiny_decoder(), example=tokens(), backend=Torch(generate=True))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_name_no_id_are_refused(temperature: float, value: float) -> None:
    logits = np.zeros((3, 4), np.float32)
    logits[1, 2] = value
    with pytest.raises(
        BackendError, match=r"the logits of row 1 are not finite \(the largest is (nan|inf)\)"
    ):
        Sampler(Sampling(temperature), 3).pick(logits)
    with pytest.raises(BackendError, match=r"row 0 are not finite \(the largest is -inf\)"):
        Sampler(Sampling(temperature), 1).pick(np.full((1, 4), -np.inf, np.float32))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(size=(8, 50)).astype(np.float32) * 30
    logits[:, 7] = -np.inf
    found = Sampler(Sampling(temperature, seed=1), 8).pick(logits)
    assert found.tolist() == logits.argmax(-1).tolist()


def test_numbers_that_would_be_cut_are_refused(engine: Any) -> None:
    for prompt in (torch.tensor([3.7, 4.0]), np.array([3.7]), torch.tensor([True, False])):
        with pytest.raises(InputError, match=r"prompt 0 has dtype .*: give integer ids"):
            engine.generate(prompt, max_new_tokens=2)
    with pytest.raises(InputError, match=r"prompt 0 holds 3\.7: give text or integer ids"):
        engine.generate([3.7, 4.0], max_new_tokens=2)
    for name in ("max_new_tokens", "eos"):
        with pytest.raises(InputError, match=rf"{name}=2\.5: give a whole number"):
            engine.generate([3, 4], **{"max_new_tokens": 2, name: 2.5})


def test_whole_numbers_of_any_kind_are_taken(engine: Any) -> None:
    expected = engine.generate([3, 4], max_new_tokens=6)
    assert engine.generate(torch.tensor([3, 4], dtype=torch.int32), max_new_tokens=np.int64(6)) == expected
    end = expected[2]
    for eos in (end, np.int64(end), [end], torch.tensor([end]), torch.tensor(end)):
        assert engine.generate([3, 4], max_new_tokens=6, eos=eos) == expected[: expected.index(end)]


def _theirs(name: str, value: Any, ids: list[int], logits: np.ndarray, prompt: int = 0) -> np.ndarray:
    """The scores that a processor of transformers gives."""
    from transformers.generation import logits_process as processors

    made = getattr(processors, name)(**value)
    found = made(torch.tensor([ids]), torch.from_numpy(logits[None].astype(np.float64)))
    return np.asarray(found[0])


IDS = [3, 1, 4, 1, 5, 9, 3, 1, 4, 7, 3, 1]


@pytest.mark.parametrize(
    ("ours", "name", "theirs"),
    [
        ({"repetition_penalty": 1.7}, "RepetitionPenaltyLogitsProcessor", {"penalty": 1.7}),
        ({"repetition_penalty": 0.5}, "RepetitionPenaltyLogitsProcessor", {"penalty": 0.5}),
        ({"no_repeat_ngram_size": 1}, "NoRepeatNGramLogitsProcessor", {"ngram_size": 1}),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor", {"ngram_size": 2}),
        ({"no_repeat_ngram_size": 3}, "NoRepeatNGramLogitsProcessor", {"ngram_size": 3}),
        ({"no_repeat_ngram_size": 20}, "NoRepeatNGramLogitsProcessor", {"ngram_size": 20}),
        (
            {"min_new_tokens": 6},
            "MinNewTokensLengthLogitsProcessor",
            {"prompt_length_to_skip": 8, "min_new_tokens": 6, "eos_token_id": [2, 8], "device": "cpu"},
        ),
        (
            {"min_new_tokens": 4},
            "MinNewTokensLengthLogitsProcessor",
            {"prompt_length_to_skip": 8, "min_new_tokens": 4, "eos_token_id": [2, 8], "device": "cpu"},
        ),
        ({"logit_bias": {3: -2.5}}, "SequenceBiasLogitsProcessor", {"sequence_bias": {(3,): -2.5}}),
    ],
)
def test_penalties_are_those_of_transformers(ours: dict[str, Any], name: str, theirs: dict[str, Any]) -> None:
    """Of a text of which the last four ids are new."""
    logits = np.random.default_rng(0).normal(size=12).astype(np.float32)
    row = PenalisedRow(Penalties(**ours), IDS[:8], ends=[2, 8])
    for item in IDS[8:]:
        row.add(item)
    np.testing.assert_allclose(row.scores(logits), _theirs(name, theirs, IDS, logits), rtol=1e-12)


def test_presence_and_frequency_count_the_answer_alone() -> None:
    logits = np.arange(12, dtype=np.float32)
    row = PenalisedRow(Penalties(presence_penalty=0.5, frequency_penalty=0.25), IDS[:8], ends=[])
    for item in [3, 3, 7]:
        row.add(item)
    expected = logits.astype(np.float64)
    expected[3] -= 0.5 + 2 * 0.25
    expected[7] -= 0.5 + 0.25
    assert row.scores(logits).tolist() == expected.tolist()


@pytest.mark.parametrize("top_k", [0, 1, 5, 400])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize("min_p", [0.0, 0.3])
def test_sampled_are_the_ids_that_transformers_leaves(top_k: int, top_p: float, min_p: float) -> None:
    """With the shares that are left to them."""
    logits = np.random.default_rng(1).normal(size=40).astype(np.float32) * 2
    left = logits.astype(np.float64) / 1.3
    warpers = [
        ("TopKLogitsWarper", {"top_k": top_k}),
        ("TopPLogitsWarper", {"top_p": top_p}),
        ("MinPLogitsWarper", {"min_p": min_p}),
    ]
    for name, value in warpers:
        if next(iter(value.values())) not in (0, 0.0, 1.0) or (name == "TopKLogitsWarper" and top_k):
            left = _theirs(name, value, [0], left)
    shares = np.exp(left - left.max())
    shares /= shares.sum()
    count = 4000
    sampling = Sampling(1.3, top_p, seed=0, top_k=top_k, min_p=min_p)
    picked = Sampler(sampling, count).pick(np.tile(logits, (count, 1)))
    found = np.bincount(picked, minlength=40) / count
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(shares))
    assert np.abs(found - shares).max() < 5 * np.sqrt(0.25 / count)


def test_greedy_generation_with_penalties_is_that_of_transformers(engine: Any) -> None:
    """By the loop written out: the penalties' scores, one id after the other."""
    prompt, options = [3, 4, 3], {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}
    ids = list(prompt)
    for _ in range(12):
        logits = engine.program(
            ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64)
        )
        scores = logits["output"][0, -1].numpy()
        scores = _theirs("RepetitionPenaltyLogitsProcessor", {"penalty": 1.4}, ids, scores)
        ids.append(int(_theirs("NoRepeatNGramLogitsProcessor", {"ngram_size": 2}, ids, scores).argmax()))
    found = engine.generate([prompt, [5], prompt], max_new_tokens=12, **options)
    assert found[0] == found[2] == ids[3:]
    end = engine.generate(prompt, max_new_tokens=3)[0]
    long = engine.generate(prompt, max_new_tokens=6, min_new_tokens=6, eos=end)
    assert len(long) == 6
    assert end not in long


def test_several_answers_to_each_prompt(engine: Any) -> None:
    """A prompt with its own seed gets the ids that it gets alone, in any batch."""
    options = {"temperature": 1.5, "top_k": 20, "max_new_tokens": 5}
    found = engine.generate([[3, 4], [9]], n=3, seed=[7, 8], **options)
    assert [len(item) for item in found] == [3, 3]
    assert len({tuple(item) for item in found[0]}) == 3
    assert engine.generate([9], n=3, seed=[8], **options) == found[1]
    assert engine.generate([[9], [3], [3, 4]], n=3, seed=[8, 1, 7], **options)[2] == found[0]
    pieces = list(engine.generate([[3, 4], [9]], n=3, seed=[7, 8], stream=True, **options))
    assert [[item for row, item in pieces if row == 3 + index] for index in range(3)] == found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k=-1: give a whole number"),
        ({"top_k": 2.5}, r"top_k=2\.5: give a whole number"),
        ({"min_p": 1.5}, r"min_p=1\.5: give a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0: give a positive number"),
        ({"presence_penalty": float("nan")}, "presence_penalty=nan: give a finite number"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size=-2"),
        ({"logit_bias": [1]}, r"logit_bias=\[1\]: give a dict"),
        ({"logit_bias": {99: 1.0}}, "logit_bias has id 99: the vocabulary has ids 0 to 49"),
        ({"logit_bias": dict.fromkeys(range(50), -float("inf"))}, "no id is left to choose"),
        (
            {"seed": [1, 2], "temperature": 1.0},
            "seed has 2 numbers: give one, or one for each of the 1 prompts",
        ),
        ({"seed": -1}, "seed=-1: give an integer"),
        ({"n": 0}, "n=0: give a whole number of 1 or more"),
        ({"n": 2}, "n=2 answers would all be the likeliest"),
    ],
)
def test_bad_options_are_refused(engine: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine.generate([3, 4], max_new_tokens=2, **options)


@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.9}, {"top_p": 1e-9}, {"top_k": 50}, {"top_k": 2000}, {"min_p": 0.05}]
)
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_draws_from_a_large_vocabulary_are_those_of_all_ids_in_order(options: Any, spread: float) -> None:
    """Only the likeliest are put in order where they tell; ties and hidden ids among them."""
    random = np.random.default_rng(0)
    told = 0
    for seed in range(5):
        logits = (random.normal(size=SMALL + 7) * spread).astype(np.float32)
        logits[:: seed + 2] = np.round(logits[:: seed + 2])
        logits[8000 - seed :] = -np.inf
        sampler = Sampler(Sampling(temperature=0.8, seed=seed, **options), 1)
        weights = np.exp((logits.astype(np.float64) - float(logits.max())) / 0.8)
        share = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,))).random()
        expected = sampler._drawn_of_all(weights, share)
        found = sampler._drawn(weights, _head(weights), share)
        assert found in (None, expected)
        told += found is not None
        assert sampler.pick_one(0, logits) == expected
    assert told == 5 or spread < 6 or options.get("top_k") == 2000
