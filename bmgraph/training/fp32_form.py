"""The float32 form of a half-precision program: what a training step with precision="fp32" computes.

In half precision an update smaller than a weight's last bit is lost, and squares of gradients overflow or vanish.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.ir.program import Program, placeholders, tensor_nodes
from bmgraph.ir.shape_inference import propagate
from bmgraph.utils.stored_tensor import as_dtype

aten = torch.ops.aten

HALVES = (torch.float16, torch.bfloat16)

NARROWED, WIDENED = "narrowed", "widened"
"""Metadata keys of casts: to half precision in the program that is given, and to float32 of what it has in half precision."""


def in_fp32(program: Program) -> Program:
    """A copy of a program that computes in float32; the program itself if it has no half-precision tensors or inputs.

    Parameters that train, and buffers, become float32 (masters). Frozen parameters are kept as they are, and cast where
    they are read; inputs are cast where they come in. Casts to half precision inside the program become casts to float32.
    """
    tensors = program.tensors()
    inputs = [spec.dtype for spec in program.inputs]
    if not any(dtype in HALVES for dtype in (*inputs, *(tensor.dtype for tensor in tensors.values()))):
        return program
    wide = program.clone()
    graph = wide.graph
    for name, node in tensor_nodes(graph).items():
        tensor = tensors[name]
        if tensor.dtype not in HALVES:
            continue
        if name in program.frozen:
            _cast(graph, node)
        elif name in program.buffers:
            wide.buffers[name] = tensor.float()
        else:
            wide.parameters[name] = as_dtype(tensor, torch.float32)
    for spec, node in zip(program.inputs, placeholders(graph).values()):
        if spec.dtype in HALVES:
            _cast(graph, node)
    for node in graph.nodes:
        if node.op == "call_function":
            if node.target is aten.to.dtype and node.args[1] in HALVES:
                node.meta[NARROWED] = True
            node.args = tuple(_widened(argument) for argument in node.args)
            node.kwargs = {key: _widened(argument) for key, argument in node.kwargs.items()}
    propagate(wide, everything=True)
    return wide


def _cast(graph: fx.Graph, node: fx.Node) -> None:
    """Let all readers of a value read it in float32."""
    last = [item for item in graph.nodes if item.op == "placeholder"][-1]
    with graph.inserting_after(last if node.op == "placeholder" else node):
        cast = graph.call_function(aten.to.dtype, (node, torch.float32))
    cast.meta[WIDENED] = True
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)


def _widened(argument: Any) -> Any:
    return torch.float32 if isinstance(argument, torch.dtype) and argument in HALVES else argument
