"""What a step computes, as text: equal for the same program and loss on any device and number of ranks.

The step graph itself is no such text: torch chooses other kernels for other devices, and passes insert collectives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from bmgraph.ir.printer import program_text
from bmgraph.ir.program import Program

_DEVICE = re.compile(r",? ?\bdevice[:=] ?(device\([^)]*\)|[\w:]+)")
_NOTES = re.compile(r"  # .*$", re.MULTILINE)


def forward_text(program: Program) -> str:
    """The graphs of a program, without what passes noted on their nodes."""
    return _NOTES.sub("", program_text(program))


def loss_module(
    loss: Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], object],
    outputs: Mapping[str, torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
) -> fx.GraphModule:
    """The graph of a loss function on fake outputs and inputs, by name."""

    def call(values: list[torch.Tensor], batch: list[torch.Tensor]) -> object:
        return loss(dict(zip(outputs, values)), dict(zip(inputs, batch)))

    made: fx.GraphModule = make_fx(call)(list(outputs.values()), list(inputs.values()))
    return made


def loss_text(module: fx.GraphModule) -> str:
    """The graph of a loss function, without devices."""
    return _DEVICE.sub("", str(module.graph))


def first_difference(one: str, other: str) -> str:
    """The first line in which two texts differ, quoted; empty if they are equal."""
    lines, others = one.splitlines(), other.splitlines()
    for index in range(max(len(lines), len(others))):
        pair = [text[index].strip() if index < len(text) else "nothing" for text in (lines, others)]
        if pair[0] != pair[1]:
            return f"{pair[0][:200]!r} here, {pair[1][:200]!r} there"
    return ""
