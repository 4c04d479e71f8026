"""Products with a part of a parameter, or with a computed weight, are linears; others are named by what leaves them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.passes import LoRA, Merge, Prune, Quantize
from bmgraph.verify.metrics import relative_error
from tests.helpers.deltas import trained

Multiply = Callable[[torch.Tensor, nn.Parameter, nn.Parameter], torch.Tensor]


class Products(nn.Module):
    """A linear, then the products that `multiply(x, w, stack)` writes with parameters [32, 96] and [2, 32, 32]."""

    def __init__(self, multiply: Multiply) -> None:
        super().__init__()
        self.multiply, self.first = multiply, nn.Linear(32, 32)
        self.w, self.stack = nn.Parameter(torch.randn(32, 96) / 6), nn.Parameter(torch.randn(2, 32, 32) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(self.first(x), self.w, self.stack)


def captured(multiply: Multiply) -> Program:
    torch.manual_seed(0)
    return bg.capture(Products(multiply), {"x": torch.randn(2, 5, 32)})


SITES: dict[str, tuple[Multiply, set[str]]] = {
    "columns": (lambda x, w, s: (x @ w[:, :32]).tanh() + x @ w[:, 32:64], {"w[:,0:32]", "w[:,32:64]"}),
    "chunks": (lambda x, w, s: sum(x @ part for part in w.chunk(3, 1)),  # type: ignore[misc, return-value]
               {"w[:,0:32]", "w[:,32:64]", "w[:,64:96]"}),
    "transposed": (lambda x, w, s: x @ w[:, :32].T, {"w[:,0:32]"}),
    "on the left": (lambda x, w, s: w[:, :32] @ x.transpose(-1, -2), {"w[:,0:32]"}),
    "rows": (lambda x, w, s: x[..., :16] @ w[:16, :32], {"w[0:16,0:32]"}),
    "of a stack": (lambda x, w, s: (x @ s[0]).relu() @ s[1], {"stack[0]", "stack[1]"}),
    "scaled": (lambda x, w, s: x @ (w * 2), {"w"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SITES)
def test_a_product_with_a_part_is_a_site(name: str) -> None:
    multiply, sites = SITES[name]
    program = captured(multiply)
    assert {item.name for item in program.structure().linears} == {"first.weight", *sites}
    for item in (Quantize("int8", activations="none"), Prune("2:4")):
        edits = bg.Pipeline([item]).run(program).history[-1].edits
        assert {edit.site for edit in edits} == {"first.weight", *sites}
    tuned = trained(bg.Pipeline([LoRA(r=2, targets=("*",))]).run(program))
    merged = bg.Pipeline([Merge()]).run(tuned)
    assert relative_error(merged(**program.example)["output"], tuned(**program.example)["output"]) < 1e-5


@pytest.mark.parametrize("item", [Quantize("int8", activations="none"), Prune("2:4"), LoRA(targets=("*",))])
@pytest.mark.parametrize(
    ("multiply", "operator"),
    [
        (lambda x, w, s: torch.einsum("bsi,kio->bkso", x, s), "einsum"),
        (lambda x, w, s: torch.bmm(x[:2], s), "bmm"),
    ],
)
def test_another_product_is_declined(item: Pass, multiply: Multiply, operator: str) -> None:
    record = bg.Pipeline([item]).run(captured(multiply)).history[-1]
    assert [edit.site for edit in record.edits] == ["first.weight"]
    assert [edit.site for edit in record.declined] == ["stack"]
    assert f"multiplied by {operator}" in record.declined[0].what
