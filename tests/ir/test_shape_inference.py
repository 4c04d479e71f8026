"""Shapes computed anew: each dynamic size keeps a symbol of its own, whatever the ranges."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.ir.program import output_node
from bmgraph.ir.shape_inference import dims, propagate
from bmgraph.ir.tensor_spec import Range


class Outer(nn.Module):
    """One output whose axes are the sizes of all inputs."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return x.flatten()[:, None, None] + y.flatten()[:, None] + z.flatten()


def sizes_after(ranges: dict[str, Range]) -> tuple[object, ...]:
    program = bg.capture(Outer(), (torch.randn(3), torch.randn(4), torch.randn(5)))
    names = [str(spec.shape[0]) for spec in program.inputs]
    program.ranges |= dict(zip(names, ranges.values()))
    propagate(program, everything=True)
    returned = output_node(program.graph).args[0]
    assert isinstance(returned, tuple)
    return dims(program, returned[0].meta["val"])


@pytest.mark.parametrize(
    "ranges",
    [
        {"x": Range(1, 3), "y": Range(0, 3), "z": Range(1, 3)},  # fewer sizes than names
        {"x": Range(8), "y": Range(), "z": Range()},  # the first name cannot have the first size
        {"x": Range(100), "y": Range(100), "z": Range(100)},
    ],
)
def test_sizes_stay_apart(ranges: dict[str, Range]) -> None:
    assert len(set(sizes_after(ranges))) == 3


def test_many_names() -> None:
    class Sum(nn.Module):
        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            return torch.cat(values)

    program = bg.capture(Sum(), tuple(torch.randn(3 + size) for size in range(20)))
    propagate(program, everything=True)
    assert (
        len({str(node.meta["val"].shape[0]) for node in program.graph.nodes if node.op == "placeholder"})
        == 20
    )
