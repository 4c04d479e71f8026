"""Choosing ids: logits that are not finite, tiny temperatures, and options that are no whole numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import bmgraph as bg
from bmgraph.backends import Torch
from bmgraph.errors import BackendError, InputError
from bmgraph.runtime.generation.sampling import Sampler, Sampling
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
