"""The module that runs a program's eval form, kept from call to call until the graph is edited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from bmgraph.ir.eval_form import runnable

if TYPE_CHECKING:
    from bmgraph.ir.program import Program


@dataclass(frozen=True)
class KeptModule:
    """A module, and the state of the graph that it was made of: its calls, which edits replace."""

    calls: list[tuple[Any, ...]]
    outputs: int
    device: torch.device
    module: nn.Module

    @staticmethod
    def of(program: Program, kept: KeptModule | None) -> KeptModule:
        """The kept module if it is still that of the program, reading the program's tensors; else a new one."""
        calls = _calls(program.graph)
        device, outputs = program.device, len(program.outputs)
        if kept is None or kept.device != device or kept.outputs != outputs or kept.calls != calls:
            return KeptModule(calls, outputs, device, runnable(program, program.graph, training=False))
        for name, owner, leaf in _tensors(kept.module):
            tensor = program.tensor(name)
            held = owner._parameters.get(leaf)
            if held is None:
                owner._buffers[leaf] = tensor
            elif (
                held.data_ptr() != tensor.data_ptr()
                or held.shape != tensor.shape
                or held.dtype != tensor.dtype
            ):
                owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        return kept


def _calls(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """All that an edit can change; equal parts are the same objects, so that comparing them is quick."""
    return [(node, node.target, node.args, node.kwargs) for node in graph.nodes]


def _tensors(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """The name, the owner and the last part of the name of all tensors of a module."""
    return [
        (f"{path}.{leaf}" if path else leaf, owner, leaf)
        for path, owner in module.named_modules()
        for leaf in (*owner._parameters, *owner._buffers)
    ]
