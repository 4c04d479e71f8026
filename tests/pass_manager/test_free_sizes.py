"""A pass leaves every dynamic size dynamic, in its own program and in the one that it was given."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import VerificationError
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import fixed_sizes
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.passes import Shrink

aten = torch.ops.aten


class Attend(nn.Module):
    """Attention whose keys have another width: shape inference after pruning compares strides with the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.attend = nn.MultiheadAttention(32, 4, batch_first=True, kdim=16, vdim=16)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        keys = x[..., :16]
        return self.attend(x, keys, keys, key_padding_mask=mask == 0, need_weights=False)[0]


def test_shrinking_heads_leaves_the_batch_free_in_both_programs() -> None:
    ids = torch.randint(0, 40, (2, 7))
    program = bg.capture(Attend().eval(), {"ids": ids, "mask": torch.ones_like(ids)})
    small = bg.Pipeline([Shrink(heads=0.5)]).run(program)
    assert not fixed_sizes(program)
    assert not fixed_sizes(small)
    assert small.outputs[0].shape == ("batch", "sequence", 32)


@dataclass(frozen=True, repr=False)
class Fixes(ModelPass):
    """Says that it is exact, and writes the batch of the example into the graph."""

    def run(self, program: Program, context: Context) -> Program:
        (node,) = [item for item in program.graph.nodes if item.target is aten.relu.default]
        with program.edit(by=str(self)) as editor:
            kept = editor.call(aten.reshape.default, node, [2, 6], like=node, after=node)
            editor.replace(node, kept)
        context.edited("everywhere", "a number for the batch")
        return program


@dataclass(frozen=True, repr=False)
class Asks(ModelPass):
    """Says that it is exact, and asks for the number of a size, which fixes it."""

    def run(self, program: Program, context: Context) -> Program:
        (node,) = [item for item in program.graph.nodes if item.target is aten.relu.default]
        context.edited("everywhere", f"{int(node.meta['val'].shape[0])} rows")
        return program


@pytest.mark.parametrize(("item", "told"), [(Fixes(), "no longer runs"), (Asks(), "batch = 2 only")])
def test_a_pass_that_fixes_a_size_is_stopped(item: ModelPass, told: str) -> None:
    program = bg.capture(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), {"input": torch.randn(2, 4)})
    with pytest.raises(VerificationError, match=told):
        bg.Pipeline([item]).run(program)
