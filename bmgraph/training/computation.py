"""What a step computes, as text: equal for the same program and loss on any device and number of ranks.

The step graph itself is no such text: torch chooses other kernels for other devices, and passes insert collectives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from bmgraph.errors import InputError
from bmgraph.ir.printer import program_text
from bmgraph.ir.program import Program
from bmgraph.utils.digest import digest
from bmgraph.utils.torch_internals import distinct

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

    made: fx.GraphModule = make_fx(call)(distinct(outputs.values()), distinct(inputs.values()))
    return made


def checked_constants(constants: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors by name that a traced function made from numbers, or read besides its arguments.

    Raises InputError if one requires a gradient: it would not get any.
    """
    for tensor in constants.values():
        if tensor.requires_grad:
            raise InputError(
                f"the loss function reads a tensor {list(tensor.shape)} of its own that requires a gradient, which a step "
                "would not train: compute what depends on weights in forward and return it as an output, or detach() it"
            )
    return dict(constants)


def constants_of(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The `checked_constants` of a traced function."""
    names = dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op == "get_attr")
    return checked_constants({name: getattr(module, name) for name in names})


def loss_text(module: fx.GraphModule) -> str:
    """The graph of a loss function, without devices, and the digests of its constants."""
    constants = (f"{name}: {digest(tensor)}\n" for name, tensor in constants_of(module).items())
    return _DEVICE.sub("", str(module.graph)) + "".join(constants)


def first_difference(one: str, other: str) -> str:
    """The first line in which two texts differ, quoted; empty if they are equal."""
    lines, others = one.splitlines(), other.splitlines()
    for index in range(max(len(lines), len(others))):
        pair = [text[index].strip() if index < len(text) else "nothing" for text in (lines, others)]
        if pair[0] != pair[1]:
            return f"{pair[0][:200]!r} here, {pair[1][:200]!r} there"
    return ""
