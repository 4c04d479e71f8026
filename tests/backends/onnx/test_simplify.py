"""Decomposing single calls and asking rules by operator give the model that torch and onnxscript give, only sooner."""

from __future__ import annotations

from collections import Counter

import onnxscript.optimizer
import onnxscript.rewriter
import pytest
import torch
from onnxscript.rewriter.rules import common
from torch import nn
from torch.export import ExportedProgram

import bmgraph as bg
from bmgraph.backends.onnx import export
from bmgraph.backends.onnx.simplify import RULES
from bmgraph.lowering import local_decompositions
from bmgraph.lowering.local_decompositions import LocallyDecomposed
from bmgraph.lowering.to_exported_program import deployed
from tests.helpers.models import tiny_decoder, tiny_encoder, tokens


class Mixed(nn.Module):
    """Operators that are decomposed: a norm, conversions, a flattened and an unflattened axis, no-op arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.RMSNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.out(self.norm(x)).unflatten(-1, (2, 4)).transpose(1, 2).contiguous()
        flat = heads.transpose(1, 2).flatten(2) * 1.0 + 0.0
        kept = (x > 0) & (flat > 0)
        return flat * kept.to(flat.dtype) + torch.erfc(flat)


def operators(program: bg.Program) -> Counter[str]:
    return Counter(node.op_type for node in export.translate(deployed(program)).graph)


@pytest.mark.parametrize("kind", ["encoder", "decoder", "mixed"])
def test_operators_are_those_of_the_slow_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "mixed":
        program = bg.capture(Mixed(), {"x": torch.randn(3, 5, 8)})
    else:
        program = bg.capture((tiny_encoder if kind == "encoder" else tiny_decoder)(), tokens())
    ours = operators(program)
    monkeypatch.setattr(LocallyDecomposed, "run_decompositions", ExportedProgram.run_decompositions)
    monkeypatch.setattr(
        export,
        "simplify",
        lambda model, size: onnxscript.optimizer.optimize(
            model, input_size_limit=size, output_size_limit=size
        ),
    )
    assert ours == operators(program)


def test_every_rule_ends_in_its_operator() -> None:
    for operator, name in RULES:
        pattern = getattr(common, name)._target_pattern
        ends = [node.op_identifier() for node in pattern]
        assert ("", operator, "") in ends, name


def test_what_cannot_be_decomposed_alone_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    program = bg.capture(Mixed(), {"x": torch.randn(3, 5, 8)})
    ours = operators(program)
    monkeypatch.setattr(local_decompositions, "decomposed", lambda node, table: None)
    assert ours == operators(program)
