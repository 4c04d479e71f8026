"""The check of an engine: what it says where equal values are put in order, and what it allows on another device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import Torch
from bmgraph.errors import VerificationError
from bmgraph.pass_manager.report import Report
from bmgraph.passes import KVCache
from bmgraph.runtime.engine_check import check_engine
from bmgraph.runtime.torch.engine import TorchEngine
from bmgraph.verify.equal_values import ordered_equals
from tests.helpers.models import tiny_decoder, tokens
from tests.helpers.pretend_device import PRETEND, on_pretended

X = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))


class Ordered(nn.Module):
    """Places by the order of values; in steps of `step`, so that some are equal."""

    def __init__(self, order: Callable[[torch.Tensor], torch.Tensor], step: float) -> None:
        super().__init__()
        self.order, self.step = order, step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.order((x / self.step).round())


ORDERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "argsort": lambda x: x.argsort(-1),
    "sort": lambda x: x.sort(-1).indices,
    "topk": lambda x: x.topk(5).indices,
    "argmax": lambda x: x.argmax(-1),
    "max": lambda x: x.max(-1).indices,
}


@pytest.mark.parametrize("name", ORDERS)
def test_calls_that_order_equal_values_are_found_with_their_line(name: str) -> None:
    few = ordered_equals(bg.capture(Ordered(ORDERS[name], 2.0), (X,)), {"x": X})
    assert f"aten.{name}" in few
    assert "test_engine_check.py:" in few
    assert not ordered_equals(bg.capture(Ordered(ORDERS[name], 1e-6), (X,)), {"x": X})


def test_values_alone_are_not_told_apart() -> None:
    assert not ordered_equals(bg.capture(Ordered(lambda x: x.sort(-1).values, 2.0), (X,)), {"x": X})


def test_the_smaller_of_two_whole_numbers_is_no_place() -> None:
    smaller = Ordered(lambda x: torch.min(x.long(), x.long() * 0), 2.0)
    assert not ordered_equals(bg.capture(smaller, (X,)), {"x": X})


class Off(TorchEngine):
    """An engine whose outputs are off by a share."""

    off = 0.0

    def __call__(self, **batch: object) -> dict[str, torch.Tensor]:
        return {name: value * (1 + self.off) for name, value in super().__call__(**batch).items()}


@pytest.mark.parametrize(
    ("dtype", "rounded", "wrong"), [(torch.float16, 3e-3, 8e-3), (torch.float32, 5e-4, 3e-3)]
)
def test_an_engine_may_differ_by_what_its_program_rounds(
    dtype: torch.dtype, rounded: float, wrong: float
) -> None:
    program = bg.capture(nn.Linear(40, 8).to(dtype), (X.to(dtype),))
    engine = Off(program, Report())
    for engine.off in (rounded, wrong):
        if engine.off == wrong:
            with pytest.raises(VerificationError, match="the off engine differs"):
                check_engine(engine, program, program.example, "off")
        else:
            check_engine(engine, program, program.example, "off")


class OffAt(TorchEngine):
    """An engine whose cache is off where the mask has a value."""

    marked = 0

    def __call__(self, **batch: object) -> dict[str, torch.Tensor]:
        found, mask = super().__call__(**batch), batch["attention_mask"]
        assert isinstance(mask, torch.Tensor)
        off = (mask == self.marked)[:, None, :, None]
        return {
            name: value + 3.0 * off if name.startswith("present") else value for name, value in found.items()
        }


def test_what_a_cache_holds_of_hidden_positions_is_not_compared() -> None:
    program = bg.Pipeline([KVCache()]).run(bg.capture(tiny_decoder(layers=1), tokens()), verify="off")
    engine = OffAt(program, Report())
    check_engine(engine, program, program.example, "off")
    engine.marked = 1
    with pytest.raises(VerificationError, match="the off engine differs from its program in present_"):
        check_engine(engine, program, program.example, "off")


def test_an_engine_that_orders_equal_values_otherwise_says_so_by_name() -> None:
    told = (
        r"differs from its program in output .*: aten.topk.default at \S*test_engine_check.py:\d+ orders values of which \d+ are "
        "equal or closer than rounding"
    )
    with pytest.raises(VerificationError, match=told):
        bg.compile(Ordered(ORDERS["topk"], 1.0), passes=[], example=(X,), backend="onnx")


class Elsewhere(TorchEngine):
    """An engine on another device, whose outputs are off by a share."""

    off = 0.0

    def __call__(self, **batch: object) -> dict[str, torch.Tensor]:
        found = super().__call__(**batch)
        return {name: (value * (1 + self.off)).to(PRETEND) for name, value in found.items()}


OFF = {torch.bfloat16: 5e-2, torch.float16: 6e-3, torch.float32: 5e-4}
"""Shares that outputs on another device may be off by, two thirds of the bound or less."""


def _said(times: float) -> list[str]:
    """What the check says of engines on another device that are off by so many times OFF."""
    return [_said_of(dtype, times * off) for dtype, off in OFF.items()]


def _said_of(dtype: torch.dtype, off: float) -> str:
    x = X.to(dtype)
    program = bg.capture(nn.Linear(40, 8).to(dtype), (x,))
    engine = Elsewhere(program, Report())
    engine.off = off
    try:
        check_engine(engine, program, {program.inputs[0].name: x}, "elsewhere")
    except VerificationError as error:
        return str(error)
    return ""


def test_half_precision_may_differ_by_rounding_on_another_device() -> None:
    assert on_pretended(_said, 1.0) == [""] * len(OFF)
    assert all("the elsewhere engine differs" in text for text in on_pretended(_said, 3.0))


def _divided() -> float | None:
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 8)).eval()
    return bg.compile(model, example=(X,), backend=Torch(devices=(PRETEND, "cpu"))).report.engine_drift


def test_an_engine_of_several_devices_is_compared_where_its_program_is() -> None:
    assert on_pretended(_divided) == 0
