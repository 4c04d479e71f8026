"""A program whose linears multiply by changed weights: what deltas on them must compute."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.deltas.family import Change, DeltaFamily
from bmgraph.ir.program import Program


def with_changed_weights(program: Program, changes: Iterable[tuple[str, DeltaFamily, Change]]) -> Program:
    """A copy in which linears, by the name of their node, multiply by the weight and add the bias that a change gives.

    Sums are computed in at least float32. Of several changes of one linear the first is the innermost.
    """
    copy = program.clone()
    nodes = {node.name: node for node in copy.graph.nodes}
    for name, family, change in changes:
        linear = nodes[name]
        weight = _value(copy, linear.args[1])
        assert weight is not None
        bias = _value(copy, linear.args[2] if len(linear.args) > 2 else None)
        wide = torch.promote_types(weight.dtype, torch.float32)
        folded = family.folded(
            change.to(wide, weight.device), weight.to(wide), None if bias is None else bias.to(wide)
        )
        with copy.graph.inserting_before(linear):
            read = [
                None if value is None else _parameter(copy, f"changed.{name}.{end}", value.to(weight.dtype))
                for end, value in zip(("weight", "bias"), folded)
            ]
        linear.args = (linear.args[0], *read)
    return copy


def with_changes(program: Program, changes: Iterable[tuple[str, DeltaFamily, Change]]) -> Program:
    """A copy that computes what it computes with deltas on linears, by the name of their node, by other means than attaching
    them. Of several changes of one linear the first is the innermost."""
    return with_changed_weights(program, changes)


def _value(program: Program, expression: Any) -> torch.Tensor | None:
    return evaluate(program, expression) if isinstance(expression, fx.Node) else None


def _parameter(program: Program, name: str, value: torch.Tensor) -> fx.Node:
    program.parameters[name] = value
    return program.graph.get_attr(name)
