"""Texts as calibration: windows of tokens for what a model takes, and what texts cannot say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import ResourceError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.calibration_texts import WINDOWS, windows_of
from bmgraph.passes import Quantize
from tests.helpers.models import tiny_decoder, tokens


class Letters:
    """A tokenizer: the number of each letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 50 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


TEXTS = ["what a model reads " * 30, "and what it does not " * 200]


@pytest.fixture(scope="module")
def decoder() -> Program:
    return bg.capture(tiny_decoder(), tokens())


def test_windows_follow_each_other(decoder: Program) -> None:
    found = windows_of(TEXTS, Letters().encode, decoder)
    assert len(found) == WINDOWS
    length = found[0]["ids"].shape[1]
    assert length == 40  # as long as its table of positions
    every = [number for text in TEXTS for number in Letters().encode(text)]
    assert torch.cat([item["ids"] for item in found], 1)[0].tolist() == every[: WINDOWS * length]
    assert all(bool((item["attention_mask"] == 1).all()) for item in found)
    (short,) = windows_of("only this", Letters().encode, decoder)
    assert short["ids"].shape == (1, 9)


@pytest.mark.parametrize("item", [Quantize("int8"), Quantize("int4", method="gptq", site_drift=1.0)], ids=str)
def test_a_pass_calibrates_on_texts_as_on_their_windows(decoder: Program, item: Quantize) -> None:
    given = TEXTS[:1]
    windows = windows_of(given, Letters().encode, decoder)
    texts = bg.Pipeline([item]).run(
        decoder, calibration=given, resources={"tokenizer": Letters()}, max_drift=2.0
    )
    batches = bg.Pipeline([item]).run(decoder, calibration=windows, max_drift=2.0)
    assert texts.history[-1].resources == batches.history[-1].resources
    assert all(torch.equal(texts.parameters[name], value) for name, value in batches.parameters.items())


def test_what_texts_do_not_say_is_refused(decoder: Program) -> None:
    with pytest.raises(ResourceError, match="calibration texts need a tokenizer: pass resources="):
        bg.Pipeline([Quantize()]).run(decoder, calibration=TEXTS)
    with pytest.raises(ResourceError, match="text 1 is a int: give texts alone"):
        windows_of(["some", 3], Letters().encode, decoder)  # type: ignore[list-item]
    with pytest.raises(ResourceError, match="are 1 tokens"):
        windows_of("a", Letters().encode, decoder)
    plain = bg.capture(nn.Linear(16, 16), (torch.randn(2, 16),))
    with pytest.raises(ResourceError, match=r"one input of token ids .batch, sequence., and this one has 0"):
        windows_of(TEXTS, Letters().encode, plain)
