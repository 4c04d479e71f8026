"""What the check of an engine says where equal values are put in order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import VerificationError
from bmgraph.verify.equal_values import ordered_equals

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


def test_an_engine_that_orders_equal_values_otherwise_says_so_by_name() -> None:
    told = (
        r"differs from its program in output .*: aten.topk.default at \S*test_engine_check.py:\d+ orders values of which \d+ are "
        "equal or closer than rounding"
    )
    with pytest.raises(VerificationError, match=told):
        bg.compile(Ordered(ORDERS["topk"], 1.0), passes=[], example=(X,), backend="onnx")
