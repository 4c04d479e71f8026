"""Finite: what a sum tells is what looking at each value tells, also where the sum overflows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bmgraph.utils.finite import is_finite

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
VALUES = st.one_of(
    st.floats(-2, 2), st.sampled_from([float("nan"), float("inf"), -float("inf"), 6e4, 3e38, -3e38, 1e308])
)


@given(values=st.lists(VALUES, max_size=40), dtype=st.sampled_from((*FLOATS, torch.complex64)))
def test_it_is_what_each_value_says(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    assert is_finite(tensor) == bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sum_that_overflows_says_nothing(dtype: torch.dtype) -> None:
    tensor = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(tensor)
    tensor[7] = float("nan")
    assert not is_finite(tensor)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits(dtype: torch.dtype) -> None:
    tensor = torch.ones(8).to(dtype)
    assert is_finite(tensor)
    tensor.view(torch.uint8)[3] = 0x7F
    assert not is_finite(tensor)


def test_integers_are_finite() -> None:
    assert is_finite(torch.tensor([1, 2]))
    assert is_finite(torch.tensor([True]))
    assert is_finite(torch.empty(0))
