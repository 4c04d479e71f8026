"""A program whose linears multiply by changed weights: what deltas on them must compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.deltas.delta_calls import delta_input, input_is_changed
from bmgraph.deltas.family import Change, DeltaFamily
from bmgraph.deltas.registry import families
from bmgraph.ir.editor import unused_name
from bmgraph.ir.program import Program

if TYPE_CHECKING:
    from bmgraph.deltas.linear_family import LinearFamily

aten = torch.ops.aten


def with_changed_weights(program: Program, changes: Iterable[tuple[str, DeltaFamily, Change]]) -> Program:
    """A copy in which linears, by the name of their node, multiply by the weight and add the bias that a change gives.

    Sums are computed in at least float32. Of several changes of one linear the first is the innermost. Where a delta changes
    the input of a linear, what a family adds multiplies the input as it is before that, beside the linear.
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
        if family.adds and input_is_changed(linear):
            _add_beside(copy, linear, folded, (weight, bias))
            continue
        with copy.graph.inserting_before(linear):
            read = [
                None if value is None else _parameter(copy, f"changed.{name}.{end}", value.to(weight.dtype))
                for end, value in zip(("weight", "bias"), folded)
            ]
        linear.args = (linear.args[0], *read)
    return copy


def _add_beside(
    copy: Program,
    linear: fx.Node,
    folded: tuple[torch.Tensor, torch.Tensor | None],
    before: tuple[torch.Tensor, torch.Tensor | None],
) -> None:
    """Add the product of a linear's unchanged input with what a change makes of weight and bias, less what they were."""
    added = [
        None if new is None else (new if old is None else new - old.to(new.dtype)).to(before[0].dtype)
        for new, old in zip(folded, before)
    ]
    with copy.graph.inserting_before(linear):
        read = [
            None
            if value is None
            else _parameter(copy, unused_name(copy.parameters, f"beside.{linear.name}.{end}"), value)
            for end, value in zip(("weight", "bias"), added)
        ]
    with copy.graph.inserting_after(linear):
        beside = copy.graph.call_function(aten.linear.default, (delta_input(linear), *read))
    with copy.graph.inserting_after(beside):
        total = copy.graph.call_function(aten.add.Tensor)
    beside.meta["val"] = total.meta["val"] = linear.meta["val"]
    linear.replace_all_uses_with(total)
    total.args = (linear, beside)


class ChangeAt(NamedTuple):
    """A change of the linear whose node has this name."""

    linear: str
    family: LinearFamily
    change: Change
    options: Mapping[str, Any] = {}


def with_changes(program: Program, changes: Iterable[ChangeAt]) -> Program:
    """A copy that computes what it computes with deltas on linears, by other means than attaching them.

    Families that fold change weights; of others the formula is applied to what a linear gives. Of several changes of one
    linear the first is the innermost.
    """
    every = list(changes)
    copy = with_changed_weights(program, [item[:3] for item in every if item.family.folds])
    nodes = {node.name: node for node in copy.graph.nodes}
    applied = [item for item in every if not item.family.folds]
    sources = {family: family.sources(program) for family in {item.family for item in applied}}
    for item in applied:
        linear, source = nodes[item.linear], sources[item.family].get(item.linear)
        dtype = linear.meta["val"].dtype
        with copy.graph.inserting_before(linear):
            read = {
                key: _parameter(copy, f"applied.{item.linear}.{key}", tensor.to(copy.device))
                for key, tensor in item.change.to(dtype, copy.device).tensors.items()
            }
        with copy.graph.inserting_after(linear):
            total = copy.graph.call_function(apply_delta)
        total.meta["val"] = linear.meta["val"]
        linear.replace_all_uses_with(total)
        values = (delta_input(linear), linear, None if source is None else delta_input(nodes[source.name]))
        total.args = (item.family.name, *values, read, dict(item.change.numbers), dict(item.options))
    return copy


def apply_delta(
    name: str,
    x: torch.Tensor,
    y: torch.Tensor,
    source: torch.Tensor | None,
    tensors: Mapping[str, torch.Tensor],
    numbers: Mapping[str, float],
    options: Mapping[str, Any],
) -> torch.Tensor:
    """What a linear with a delta of a family gives, by the formula of the family."""
    family: Any = next(item for item in families() if item.name == name)
    changed: torch.Tensor = family.applied(Change(tensors, numbers), options, x, y, source)
    return changed


def _value(program: Program, expression: Any) -> torch.Tensor | None:
    return evaluate(program, expression) if isinstance(expression, fx.Node) else None


def _parameter(program: Program, name: str, value: torch.Tensor) -> fx.Node:
    program.parameters[name] = value
    return program.graph.get_attr(name)
