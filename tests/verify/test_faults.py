"""Fault injection: each fault, planted in a pass declared exact or in Quantize, is caught by verification at default
settings, with a message that names the pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import fx

import bmgraph as bg
from bmgraph.errors import VerificationError
from bmgraph.ir.editor import remove_dead
from bmgraph.ir.program import Program, output_node
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.passes import Quantize

aten = torch.ops.aten
Fault = Callable[[Program], None]


def _nodes(program: Program, target: object) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is target]


def _change(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    def fault(program: Program) -> None:
        program.parameters[name] = how(program.parameters[name].clone())

    return fault


def _zero_row(weight: torch.Tensor) -> torch.Tensor:
    weight[3] = 0
    return weight


def _nan(weight: torch.Tensor) -> torch.Tensor:
    weight[0, 0] = float("nan")
    return weight


def _drop_mask(program: Program) -> None:
    _nodes(program, aten.scaled_dot_product_attention.default)[0].update_arg(3, None)


def _wrong_scale(program: Program) -> None:
    _nodes(program, aten.scaled_dot_product_attention.default)[1].update_kwarg("scale", 0.3)


def _swap_q_and_k(program: Program) -> None:
    node = _nodes(program, aten.scaled_dot_product_attention.default)[0]
    node.args = (node.args[1], node.args[0], *node.args[2:])


def _drop_bias(program: Program) -> None:
    node = _nodes(program, aten.linear.default)[2]
    node.args = node.args[:2]


def _rewire(program: Program) -> None:
    first, second = _nodes(program, aten.layer_norm.default)[:2]
    _nodes(program, aten.linear.default)[6].replace_input_with(second, first)


def _drop_residual(program: Program) -> None:
    node = _nodes(program, aten.add.Tensor)[1]
    node.replace_all_uses_with(node.args[1])


def _other_activation(program: Program) -> None:
    _nodes(program, aten.gelu.default)[0].target = aten.relu.default


def _approximate_activation(program: Program) -> None:
    _nodes(program, aten.gelu.default)[1].update_kwarg("approximate", "tanh")


def _large_epsilon(program: Program) -> None:
    _nodes(program, aten.layer_norm.default)[0].update_arg(4, 0.1)


def _wrong_dtype(program: Program) -> None:
    node = _nodes(program, aten.linear.default)[-1]
    with program.edit() as editor:
        half = editor.call(aten.to.dtype, node, torch.float16, like=node, after=node)
        editor.replace(node, half)


def _low_precision_inside(program: Program) -> None:
    node = _nodes(program, aten.gelu.default)[0]
    with program.edit() as editor:
        half = editor.call(aten.to.dtype, node, torch.bfloat16, like=node, after=node)
        editor.replace(node, editor.call(aten.to.dtype, half, torch.float32, like=node, after=half))
        half.args = (node, torch.bfloat16)


def _swap_outputs(program: Program) -> None:
    output = output_node(program.graph)
    output.args = (tuple(reversed(output.args[0])),)


def _lose_an_output(program: Program) -> None:
    output = output_node(program.graph)
    output.args = (output.args[0][:1],)


def _swap_heads(program: Program) -> None:
    weight = program.parameters["blocks.0.v.weight"].clone()
    weight[:8], weight[8:16] = weight[8:16].clone(), weight[:8].clone()
    program.parameters["blocks.0.v.weight"] = weight


EXACT: dict[str, Fault] = {
    "a weight transposed": _change("blocks.0.q.weight", lambda w: w.T.contiguous()),
    "a row zeroed": _change("blocks.1.up.weight", _zero_row),
    "a weight scaled by 1.001": _change("blocks.1.o.weight", lambda w: w * 1.001),
    "a NaN planted": _change("blocks.1.o.weight", _nan),
    "a norm's bias shifted": _change("blocks.0.first.bias", lambda b: b + 0.01),
    "the mask dropped": _drop_mask,
    "the attention's scale changed": _wrong_scale,
    "queries and keys swapped": _swap_q_and_k,
    "a bias dropped": _drop_bias,
    "an edge rewired": _rewire,
    "a residual dropped": _drop_residual,
    "another activation": _other_activation,
    "an approximate activation": _approximate_activation,
    "a large epsilon": _large_epsilon,
    "an output in half precision": _wrong_dtype,
    "half precision inside": _low_precision_inside,
    "outputs swapped": _swap_outputs,
    "an output lost": _lose_an_output,
    "two heads swapped": _swap_heads,
}

W = "blocks.1.up.weight"

QUANTIZE: dict[str, Fault] = {
    "a scale halved": _change(f"{W}_scale", lambda s: s / 2),
    "one channel's scale doubled": _change(f"{W}_scale", lambda s: torch.cat([s[:1] * 2, s[1:]])),
    "channels rolled by one": _change(f"{W}_codes", lambda c: c.roll(1, 0)),
    "codes of the square matrix transposed": _change("blocks.0.q.weight_codes", lambda c: c.T.contiguous()),
    "a sign flipped": _change(f"{W}_codes", lambda c: -c),
    "an activation's scale halved": _change("blocks.0.q.weight_input_scale", lambda s: s / 2),
    "an activation's zero point moved": _change("blocks.0.up.weight_input_zero", lambda z: z - 60),
    "the mask dropped": _drop_mask,
    "a bias dropped": _drop_bias,
    "another activation": _other_activation,
    "queries and keys swapped": _swap_q_and_k,
    "an untouched norm changed": _change("blocks.1.second.weight", lambda w: w * 1.02),
}


@dataclass(frozen=True, repr=False)
class Harmless(ModelPass):
    """Declares itself exact, and applies the fault that a test plants."""

    fault: str = ""

    def run(self, program: Program, context: Context) -> Program:
        context.edited("everywhere", "a planted fault")
        EXACT[self.fault](program)
        remove_dead(program)
        return program


@dataclass(frozen=True, repr=False)
class FaultyQuantize(Quantize):
    """Quantize with a planted fault."""

    fault: str = ""

    def run(self, program: Program, context: Context) -> Program:
        program = super().run(program, context)
        QUANTIZE[self.fault](program)
        return program


def test_there_are_enough_faults() -> None:
    assert len(EXACT) + len(QUANTIZE) >= 20


@pytest.mark.parametrize("fault", EXACT)
def test_a_fault_in_an_exact_pass_is_stopped(program: Program, fault: str) -> None:
    with pytest.raises(VerificationError, match="pass harmless"):
        bg.Pipeline([Harmless(fault)]).run(program)


@pytest.mark.parametrize("fault", QUANTIZE)
def test_a_fault_in_quantize_is_stopped(
    program: Program, batches: list[dict[str, torch.Tensor]], fault: str
) -> None:
    item = FaultyQuantize("int8", activations="static", outliers=False, fault=fault)
    with pytest.raises(VerificationError, match="pass faultyquantize"):
        bg.Pipeline([item]).run(program, calibration=batches)


def test_without_the_fault_nothing_is_stopped(
    program: Program, batches: list[dict[str, torch.Tensor]]
) -> None:
    QUANTIZE[""] = EXACT[""] = lambda program: None
    try:
        bg.Pipeline([Harmless(""), FaultyQuantize("int8", activations="static", fault="")]).run(
            program, calibration=batches
        )
    finally:
        del QUANTIZE[""], EXACT[""]
