"""Sizes are sums of products, read from their text once; two ways to write one are one."""

from __future__ import annotations

import pytest
import torch

from bmgraph.errors import InputError
from bmgraph.ir.input_check import check_inputs
from bmgraph.ir.program import FORWARD, Program
from bmgraph.ir.signature import Signature
from bmgraph.ir.symbolic_dim import SymbolicDim, names_of, size_of
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.verify.reference_outputs import other_batch

SIZES = {"past": 3, "sequence": 4}


@pytest.mark.parametrize(
    ("text", "size", "written"),
    [("past", 3, "past"), ("past + sequence", 7, "past + sequence"), ("sequence + past", 7, "past + sequence"),
     ("2*past", 6, "2*past"), ("past*2 - 1", 5, "2*past - 1"), ("2*(past + sequence) + past", 17, "3*past + 2*sequence"),
     ("sequence**2 + 1", 17, "sequence*sequence + 1"), ("-past + sequence", 1, "-past + sequence"), ("7", 7, "7"),
     ("past - past", 0, "0")],
)  # fmt: skip
def test_a_size_is_a_sum_of_products(text: str, size: int, written: str) -> None:
    assert size_of(text, SIZES) == size
    assert str(SymbolicDim.of(text)) == written
    assert SymbolicDim.of(written) == SymbolicDim.of(text)


@pytest.mark.parametrize(
    "text",
    ["past//2", "past % 2", "Max(past, 1)", "past + other", "past +", "past.x", "past**99", "(past + 1)**8 * (past + 1)**8",
     "[" * 300, "(" * 300 + "past" + ")" * 300, "True", "'a'"],
)  # fmt: skip
def test_what_is_none(text: str) -> None:
    assert size_of(text, SIZES) is None


def test_names() -> None:
    assert names_of("2*past + past*sequence") == ("past", "sequence")
    assert names_of("past//2") is None
    assert SymbolicDim.of("past + 1") is SymbolicDim.of("past + 1"), "parsed once"


def test_a_size_less_is_checked_and_varied() -> None:
    series = TensorSpec("x", torch.float32, ("batch", "sequence"))
    steps = TensorSpec("steps", torch.float32, ("batch", "sequence - 1"))
    batch = {"x": torch.randn(2, 6), "steps": torch.randn(2, 5)}
    assert check_inputs((series, steps), {}, batch).keys() == batch.keys()
    with pytest.raises(InputError, match=r"'steps' has size 6 at dimension 1: expected sequence - 1 = 5"):
        check_inputs((series, steps), {}, {**batch, "steps": torch.randn(2, 6)})
    other = other_batch(Program({}, {}, {}, {FORWARD: Signature((series, steps))}), batch)
    assert other is not None
    assert {name: tuple(value.shape) for name, value in other.items()} == {"x": (3, 9), "steps": (3, 8)}


def test_specs_keep_their_text() -> None:
    spec = TensorSpec("x", torch.float32, ("batch", "past + sequence"))
    assert str(spec) == "x: f32[batch, past + sequence]"
    assert Program({}, {}, {}, {FORWARD: Signature((spec,))}).inputs[0].shape == ("batch", "past + sequence")
