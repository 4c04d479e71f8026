"""Fused kernels compared with torch's loops, Lion by its formula, and schedules with a warm-up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bmgraph.backends import SGD, WSD, AdamW, Constant, Cosine, Exponential, Linear, Lion, Noam
from bmgraph.errors import InputError
from bmgraph.training.lr_schedules import Schedule
from bmgraph.training.optimizers import Moments, Optimizer

STEPS = 20


def moved(rule: Optimizer, size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A tensor after some steps of a rule, and the gradients that it was given."""
    generator = torch.Generator().manual_seed(0)
    value, moments = torch.randn(size, generator=generator), Moments()
    given = [torch.randn(size, generator=generator) for _ in range(STEPS)]
    for step, gradient in enumerate(given):
        rule.update([value], [gradient.clone()], [moments], rule.lr, step + 1)
    return value, given


@pytest.mark.parametrize(
    ("rule", "build"),
    [
        (AdamW(lr=0.01, weight_decay=0.1), lambda x: torch.optim.AdamW(x, lr=0.01, weight_decay=0.1)),
        (SGD(lr=0.1, momentum=0.9), lambda x: torch.optim.SGD(x, lr=0.1, momentum=0.9)),
    ],
)
def test_fused_kernels_round_otherwise_than_loops_and_no_more(
    rule: Optimizer, build: Callable[[list[torch.Tensor]], torch.optim.Optimizer]
) -> None:
    found, given = moved(rule, 1003)
    expected = torch.randn(1003, generator=torch.Generator().manual_seed(0))
    loop = build([expected])
    assert not loop.param_groups[0]["fused"]
    for gradient in given:
        expected.grad = gradient
        loop.step()
    assert float((found - expected).norm() / expected.norm()) < 1e-7


def test_lion_is_its_formula() -> None:
    rule = Lion(lr=0.03, betas=(0.9, 0.99), weight_decay=0.5)
    found, given = moved(rule, 50)
    value = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    average = torch.zeros(50).double()
    for gradient in given:
        direction = torch.sign(0.9 * average + 0.1 * gradient.double())
        value = value - 0.03 * (direction + 0.5 * value)
        average = 0.99 * average + 0.01 * gradient.double()
    assert torch.allclose(found.double(), value, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "end", "share"),
    [
        (Constant(warmup=4), 20, 1.0),
        (Linear(warmup=4, steps=20), 12, 0.5),
        (Cosine(warmup=4, steps=20), 12, 0.5),
        (Exponential(warmup=4, gamma=0.5), 6, 0.25),
        (Noam(warmup=4), 16, 0.5),
        (WSD(warmup=4, steps=20, decay=4), 18, 0.5),
    ],
)
def test_schedules_warm_up_and_decay(schedule: Schedule, end: int, share: float) -> None:
    assert [schedule.share(step) for step in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert schedule.share(end) == pytest.approx(share)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: WSD(warmup=4, steps=20, decay=17),
            "decay=17: give 1 or more steps, and no more than are left",
        ),
        (lambda: Exponential(gamma=1.5), "gamma=1.5: give a factor above 0"),
        (lambda: AdamW(no_decay="norm"), "no_decay='norm': give True"),  # type: ignore[arg-type]
        (lambda: Lion(betas=(0.9, 1.0)), "give two numbers of 0 or more that are less than 1"),
    ],
)
def test_options_that_are_not_valid(build: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()
