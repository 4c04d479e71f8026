"""Parameter count, bytes and floating-point operations of a program."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import fx

from bmgraph.ir.pass_record import Cost
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Flops
from bmgraph.ops.traits import traits_of


def cost(program: Program) -> Cost:
    """Cost of a program: number of parameters, their size in bytes, and FLOPs (2 per multiply-add) of one run on the example.

    Counted are linears, matrix products, attentions and convolutions; elementwise operators are not.
    """
    return cost_of(program.parameters.values(), program.graphs.values(), program)


def cost_of(tensors: Iterable[torch.Tensor], graphs: Iterable[fx.Graph], program: Program) -> Cost:
    """Cost of graphs that hold tensors; their sizes are those of a program's example."""
    held = list(tensors)
    sizes = _sizes(program)
    return Cost(
        sum(tensor.numel() for tensor in held),
        sum(tensor.numel() * tensor.element_size() for tensor in held),
        sum(_flops(node, sizes) for graph in graphs for node in graph.nodes),
    )


def _sizes(program: Program) -> dict[Any, int]:
    """Value of every size symbol on the example batch."""
    by_name = {
        dim: tensor.shape[axis]
        for spec in program.inputs
        if (tensor := program.example.get(spec.name)) is not None
        for axis, dim in enumerate(spec.shape)
        if isinstance(dim, str)
    }
    import sympy

    return {
        symbol: sympy.Integer(by_name[name]) for symbol, name in program.symbols.items() if name in by_name
    }


def _flops(node: fx.Node, sizes: dict[Any, int]) -> int:
    """FLOPs of one node; 0 for operators that are not counted."""
    row = traits_of(node)
    if row.flops is Flops.PRODUCT:
        return 2 * prod(_shape(node, sizes)) * _shape(node.args[row.factors[0]], sizes)[-1]
    if row.flops is Flops.EXPERTS:
        return 2 * prod(_shape(node, sizes)) * _shape(node.args[1], sizes)[-1]
    if row.flops is Flops.ATTENTION:
        q, k = _shape(node.args[0], sizes), _shape(node.args[1], sizes)
        return 2 * prod(q) * k[-2] + 2 * prod(q[:-1]) * k[-2] * _shape(node.args[2], sizes)[-1]
    if row.flops is Flops.CONVOLUTION:
        return 2 * prod(_shape(node, sizes)) * prod(_shape(node.args[1], sizes)[1:])
    return 0


def _shape(node: Any, sizes: dict[Any, int]) -> list[int]:
    return [_size(size, sizes) for size in node.meta["val"].shape]


def _size(size: Any, sizes: dict[Any, int]) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr.xreplace(sizes)
    return int(expression) if expression.is_number else max(int(size.node.hint or 1), 1)
