"""A size that several inputs have is read from the first of them, so that no input is needed for its size alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.ir.program import Program, placeholders

aten = torch.ops.aten


def read_sizes_from_first(program: Program) -> None:
    """Let every call that reads a size of an input read it from the first input that has it, in place.

    Export reads a shared size wherever it likes: from labels, which an engine does not have.
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
