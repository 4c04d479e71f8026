"""`fake_quantize` and the learned scale of `quantize_static`: values by a formula, gradients of the formula by autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmgraph.ops.fake_quantization import fake_quantize, fake_quantize_blocks, nearest_codes
from bmgraph.ops.quantization import quantize_static


def passed(x: torch.Tensor) -> torch.Tensor:
    """x rounded, with the gradient of x."""
    return (x.round() - x).detach() + x


def scaled(step: torch.Tensor, factor: float) -> torch.Tensor:
    """A step, whose gradient is multiplied by a factor (Esser et al. 2020, appendix)."""
    return (step - step * factor).detach() + step * factor


def learned(x: torch.Tensor, step: torch.Tensor, least: int, most: int, count: int) -> torch.Tensor:
    """LSQ for values that share a step; as in torch's own fake quantization, what rounds to a code does not clip."""
    step = scaled(step, (count * most) ** -0.5)
    return passed(x / step).clamp(least, most) * step


def by_blocks(x: torch.Tensor, step: torch.Tensor, block: int, least: int, most: int) -> torch.Tensor:
    """The same for f[N, K], a block at a time."""
    rows = [
        torch.cat(
            [
                learned(row[first : first + block], step[number, place], least, most, block)
                for place, first in enumerate(range(0, len(row), block))
            ]
        )
        for number, row in enumerate(x)
    ]
    return torch.stack(rows)


def gradients(value: torch.Tensor, factor: torch.Tensor, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad((value * factor).sum(), of)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("rows", "columns", "block"), [(5, 40, 16), (1, 32, 16), (4, 24, 0), (1, 8, 0)])
def test_values_and_gradients_are_those_of_the_formula(
    axis: int, rows: int, columns: int, block: int
) -> None:
    torch.manual_seed(rows)
    size = block or columns
    x = 2 * torch.randn(rows, columns, dtype=torch.float64)
    step = 0.2 + 0.1 * torch.rand(rows, -(-columns // size), dtype=torch.float64)
    step[0, -1] *= -1  # as the scale of a block whose largest value is positive
    if rows > 1:
        x[0, :size] = 0  # a block of zeros
    factor = torch.randn(rows, columns, dtype=torch.float64)
    x.requires_grad_()
    step.requires_grad_()
    expected = by_blocks(x, step, size, -4, 3)
    stored = x.detach().T.contiguous().requires_grad_() if axis else x.detach().requires_grad_()
    steps = step.detach().clone().requires_grad_()
    found = (
        fake_quantize_blocks(stored, steps, axis, block, -4, 3)
        if block
        else fake_quantize(stored, steps[:, 0], axis, -4, 3)
    )
    torch.testing.assert_close(found.T if axis else found, expected, rtol=1e-12, atol=1e-12)
    mine = gradients(found, factor.T if axis else factor, stored, steps)
    theirs = gradients(expected, factor, x, step)
    torch.testing.assert_close(mine[0].T if axis else mine[0], theirs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-10, atol=1e-12)
    assert bool((theirs[0] == 0).any())  # codes clip
    (alone,) = gradients(
        fake_quantize(stored, step.detach()[:, 0], axis, -4, 3), factor.T if axis else factor, stored
    )
    assert alone.shape == stored.shape


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_the_scale_of_activations_has_the_gradient_of_the_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 6, 8, dtype=torch.float64)).requires_grad_()
    scale = torch.tensor(0.02, dtype=torch.float64, requires_grad=True)
    zero = torch.tensor(100 if dtype is torch.uint8 else 0, dtype=dtype)
    limits, factor = torch.iinfo(dtype), torch.randn(2, 6, 8, dtype=torch.float64)
    by = scaled(scale, (8 * limits.max) ** -0.5)
    expected = ((passed(x / by) + zero).clamp(limits.min, limits.max) - zero) * by
    found = quantize_static(x, scale, zero)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(found, factor, x, scale), gradients(expected, factor, x, scale)):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    (fixed,) = gradients(quantize_static(x, scale.detach(), zero), factor, x)
    assert torch.equal(fixed, gradients(quantize_static(x, scale, zero), factor, x)[0])


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 4),
    columns=st.integers(1, 40),
    form=st.sampled_from([(16, -8, 7), (16, -7, 7), (0, -127, 127), (32, -2, 1)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rounding_is_near_stays_and_is_codes_times_steps(
    seed: int, rows: int, columns: int, form: tuple[int, int, int], dtype: torch.dtype
) -> None:
    block, least, most = form
    torch.manual_seed(seed)
    x = torch.randn(rows, columns).to(dtype)
    step = (0.05 + torch.rand(rows, -(-columns // (block or columns)))).to(dtype)
    given: Any = (0, block, least, most)
    once = fake_quantize_blocks(x, step, *given)
    wide = step.repeat_interleave(block or columns, 1)[:, :columns]
    codes = nearest_codes(x, step, *given)
    assert torch.equal(once, codes.to(dtype) * wide)
    assert torch.equal(nearest_codes(once, step, *given), codes)
    inside = (x.float() / wide.float()).clamp(least, most) == x.float() / wide.float()
    error = (codes * wide.float() - x.float()).abs() / wide.float()
    assert not bool(inside.any()) or float(error[inside].max()) <= 0.5 + 1e-5


def test_a_step_that_has_become_zero_gives_zeros_and_finite_gradients() -> None:
    x, step = torch.randn(2, 16, requires_grad=True), torch.zeros(2, 1, requires_grad=True)
    found = fake_quantize_blocks(x, step, 0, 16, -8, 7)
    assert not bool(found.any())
    assert all(bool(item.isfinite().all()) for item in gradients(found, torch.ones(2, 16), x, step))
