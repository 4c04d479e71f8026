"""Refuses calls in float64 for which ONNX Runtime has no kernel, before anything is translated."""

from __future__ import annotations

import torch
from torch import fx

from bmgraph.analysis.structure.value_origins import stem
from bmgraph.errors import BackendError
from bmgraph.ir.program import Program
from bmgraph.ops.traits import calls

LACKING = (torch.ops.aten.scaled_dot_product_attention, torch.ops.aten.gelu)
"""Operators of torch without a kernel in float64; ours have none at all."""


def check_float64(program: Program) -> None:
    """Raise BackendError for the first call in float64 without a kernel; names operator, site and pass."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.dtype != torch.float64:
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target.namespace == "bmgraph" or calls(node, *LACKING):
            raise BackendError(
                f"{stem(node)} of {_site(node)}, made by {node.meta.get('pass', 'capture')}, computes in float64, for which ONNX "
                "Runtime has no kernel: capture the model in float32 (model.float())"
            )


def _site(node: fx.Node) -> str:
    return str(node.meta.get("site") or node.meta.get("scope") or "the model's root")
