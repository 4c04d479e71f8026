"""Read each dynamic size from the first input that has it, so that no input is needed for its size alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.ir.program import Program, placeholders

aten = torch.ops.aten


def read_sizes_from_first_input(program: Program) -> None:
    """Redirect every `sym_size` of an input to the first input with that size, in place.

    Export may read a shared size from any input, even from labels, which an engine does not have.
    """
    inputs = placeholders(program.graph)
    first: dict[Any, tuple[fx.Node, int]] = {}
    for spec in program.inputs:
        for axis, size in enumerate(inputs[spec.name].meta["val"].shape):
            if isinstance(size, torch.SymInt):
                first.setdefault(size.node.expr, (inputs[spec.name], axis))
    for node in program.graph.nodes:
        if node.target is aten.sym_size.int and node.args[0] in inputs.values():
            size = node.meta.get("val")
            if isinstance(size, torch.SymInt) and size.node.expr in first:
                node.args = first[size.node.expr]
