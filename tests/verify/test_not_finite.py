"""Values that are not finite: equal ones prove nothing, and new ones are caught."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import VerificationError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes import LoRA, Quantize

aten = torch.ops.aten
X = {"x": torch.randn(3, 16, generator=torch.Generator().manual_seed(0))}


class Half(nn.Module):
    """A linear in float16."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.factor = nn.Linear(16, 24).half(), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.half()) * self.factor  # type: ignore[no-any-return]


def _lora(alpha: float) -> bg.Pipeline:
    return bg.Pipeline([LoRA(r=2, alpha=alpha, targets=("*",))])


def test_a_proof_whose_values_overflow_on_both_sides_is_none() -> None:
    program = bg.capture(Half(), X)
    assert _lora(4).run(program)
    told = (
        r"with random values .*: this cannot be compared, since \d+ of 72 values of output, all finite before the pass, "
        "overflow float16 in what is expected: make what the pass adds smaller"
    )
    with pytest.raises(VerificationError, match=told):
        _lora(1e7).run(program)


@pytest.mark.parametrize("item", [LoRA(r=2, targets=("*",)), Quantize(activations="none")])
def test_a_program_that_gives_no_number_is_not_compared(item: ModelPass) -> None:
    program = bg.capture(Half(factor=1e30), X)
    with pytest.raises(VerificationError, match="no value of output is finite on the batch of 3x16"):
        bg.Pipeline([item]).run(program)


@dataclass(frozen=True)
class Spoil(ModelPass):
    """x + 0 log x: negative values become NaN, the others stay."""

    effect: ClassVar[Effect] = "exact"

    def run(self, program: Program, context: Context) -> Program:
        with program.edit(by=str(self)) as editor:
            last = next(node for node in reversed(editor.graph.nodes) if node.op == "call_function")
            made = last
            for target, args in (
                (aten.log.default, ()), (aten.mul.Tensor, (0.0,)), (aten.add.Tensor, (last,)),
            ):  # fmt: skip
                made = editor.call(target, made, *args, like=last, after=made)
            editor.replace(last, made)
        context.edited("output", "spoiled")
        return program


def test_values_that_were_finite_before_an_exact_pass_are_caught() -> None:
    with pytest.raises(VerificationError, match="it is declared exact, but output moved by inf"):
        bg.Pipeline([Spoil()]).run(bg.capture(Half(), X))
