"""A program whose linears multiply by changed weights: what deltas on them must compute."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.ir.program import Program


def with_changed_weights(program: Program, changes: Mapping[str, torch.Tensor]) -> Program:
    """A copy in which linears, by the name of their node, multiply by their weight plus a change f[out, in]."""
    copy = program.clone()
    nodes = {node.name: node for node in copy.graph.nodes}
    for name, change in changes.items():
        linear = nodes[name]
        expression = linear.args[1]
        assert isinstance(expression, fx.Node)
        weight = evaluate(copy, expression)
        changed = f"changed.{name}"
        copy.parameters[changed] = (weight.to(change.dtype) + change).to(weight.dtype)
        with copy.graph.inserting_before(linear):
            linear.update_arg(1, copy.graph.get_attr(changed))
    return copy


def add_change(changes: dict[str, torch.Tensor], name: str, change: torch.Tensor) -> None:
    """Add a change to that of a linear, of which several deltas may change one."""
    changes[name] = changes[name] + change if name in changes else change
