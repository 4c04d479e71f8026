"""A pass is held to what it names: rounding to its weights, a calibrated method to the outputs of its sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers

import bmgraph as bg
from bmgraph.api import (
    Context,
    Effect,
    Measure,
    ModelPass,
    Observed,
    OutputsMoved,
    Program,
    VerificationError,
    WeightsMoved,
    evaluate,
    linears,
    weight_of,
)
from tests.helpers.int4 import compensated, rounded


@dataclass(frozen=True, repr=False)
class Int4(ModelPass):
    """4-bit weights with one scale for each output channel, and no limit of its own on what a site may lose."""

    effect: ClassVar[Effect] = "approximate"
    default_drift: ClassVar[float] = 0.5

    method: str = "nearest"
    by: str = "outputs"
    wrong: bool = False

    @property
    def measured(self) -> Measure:
        return OutputsMoved(0.1) if self.by == "outputs" else WeightsMoved(0.2)

    def run(self, program: Program, context: Context) -> Program:
        found = [(node, weight) for node in linears(program.graph) if (weight := weight_of(program, node))]
        seconds: dict[str, torch.Tensor] = {}

        def visit(name: str, x: torch.Tensor) -> None:
            rows = x.flatten(0, -2)
            seconds[name] = rows.T @ rows

        names = {node.args[0].name for node, _ in found}
        Observed(program).run(program.example, names, visit)
        with program.edit(by=str(self)) as editor:
            for node, weight in found:
                value = evaluate(program, weight.node)
                if self.method == "nearest":
                    codes, scale = rounded(value)
                else:
                    codes, scale = compensated(value, seconds[node.args[0].name])
                if self.wrong and weight is found[0][1]:
                    scale = scale * 1.15
                readers = [
                    editor.parameter(
                        f"{weight.site}_{part}", tensor, like=weight.node, frozen=True, part=part
                    )
                    for part, tensor in (("codes", codes), ("scale", scale.to(value.dtype)))
                ]
                made = editor.call(
                    torch.ops.bmgraph.dequantize.default,
                    *readers,
                    0,
                    like=node,
                    site=weight.site,
                    part="weight",
                )
                node.update_arg(1, made)
                context.edited(weight.site, "int4")
        return program


@pytest.fixture(scope="module")
def llama() -> Program:
    """A toy Llama of 2 layers, 128 wide."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    ids = torch.randint(0, 99, (3, 24))
    return bg.capture(
        transformers.LlamaForCausalLM(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    )


def test_int4_to_the_nearest_is_stopped_by_its_sites_outputs(llama: Program) -> None:
    with pytest.raises(VerificationError, match=r"its output changed by 0\.\d+ \(relative\).*more than 0\.1"):
        bg.Pipeline([Int4()]).run(llama)


def test_a_calibrated_assignment_is_let_through(llama: Program) -> None:
    done = bg.Pipeline([Int4("compensated")]).run(llama)
    assert done.history[-1].drift < 0.1
    with pytest.raises(
        VerificationError, match=r"of its weight changed by 0\.\d+ .*more than 0\.2"
    ):  # its weights alone do not show that it is better
        bg.Pipeline([Int4("compensated", by="weights")]).run(llama)


def test_a_wrong_scale_is_named(llama: Program) -> None:
    with pytest.raises(VerificationError, match=r"layers\.0.*its output changed"):
        bg.Pipeline([Int4("compensated", wrong=True)]).run(llama)
