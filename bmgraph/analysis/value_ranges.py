"""Finds which integers an input may hold: those that the tables hold in which the dataflow looks them up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from bmgraph.ir.matching import plain_size
from bmgraph.ir.node_role import SOFT_TOKENS, has_role
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.ops.trait_row import Kind, Lookup
from bmgraph.ops.traits import calls, traits_of

Bounds = tuple[int, int | None]
"""The smallest and the largest value, both included; None if there is no known largest one."""

aten = torch.ops.aten

LEAST = -(2**63)
"""The smallest integer."""

INTEGERS = (torch.int64, torch.int32)


def with_value_ranges(program: Program) -> tuple[TensorSpec, ...]:
    """The program's input specs, with the range of values of each input that is looked up in tables."""
    found = value_ranges(program.graph)
    return tuple(replace(spec, values=found.get(spec.name)) for spec in program.inputs)


def value_ranges(graph: fx.Graph) -> dict[str, Bounds]:
    """The bounds of each integer input all of whose elements are looked up somewhere, by name.

    Only what eager refuses is outside of them: a value that is replaced, clamped or cut away on its way to a table (a
    label of -100, the last id of a sequence) is not bounded by that table.
    """
    wanted: dict[fx.Node, Bounds] = {}
    selected: dict[tuple[fx.Node, int], dict[int, Bounds]] = {}
    for node in reversed(graph.nodes):
        for ids, bounds in _lookups(node):
            _narrow(wanted, ids, bounds)
        for bounds in _from_selections(node, selected):
            _narrow(wanted, node, bounds)
        if node in wanted and node.op == "call_function":
            _pass_on(node, wanted, selected)
    return {
        str(node.target): bounds
        for node, bounds in wanted.items()
        if node.op == "placeholder" and node.meta["val"].dtype in INTEGERS
    }


def _narrow(wanted: dict[fx.Node, Bounds], node: Any, bounds: Bounds) -> None:
    """Let a node's values lie within `bounds` too."""
    if isinstance(node, fx.Node):
        low, high = wanted.get(node, bounds)
        tops = [item for item in (high, bounds[1]) if item is not None]
        wanted[node] = (max(low, bounds[0]), min(tops) if tops else None)


def _lookups(node: fx.Node) -> Iterator[tuple[Any, Bounds]]:
    """The indices that a call reads, each with the values that eager takes."""
    if node.op != "call_function":
        return
    lookup, args = traits_of(node).lookup, node.args
    if lookup is Lookup.ROWS:
        yield args[1], _below(args[0], 0)
    elif lookup in (Lookup.AXIS, Lookup.WRITTEN_AXIS) and isinstance(args[1], int):
        yield args[2], _below(args[0], args[1])
    elif calls(node, aten.one_hot) and isinstance(args[1], int) and args[1] > 0:
        yield args[0], (0, args[1] - 1)
    elif lookup is Lookup.EXPERTS:
        yield args[2], _below(args[1], 0)
    elif lookup is Lookup.LIST:
        indices: Any = args[1]
        for axis, ids in enumerate(indices):
            _, high = _below(args[0], axis)
            if isinstance(ids, fx.Node) and ids.meta["val"].dtype in INTEGERS and high is not None:
                yield ids, (-high - 1, high)


def _below(table: Any, axis: int) -> Bounds:
    """From 0 to below the size of an axis."""
    shape = table.meta["val"].shape
    size = plain_size(shape[axis]) if len(shape) else 1
    return 0, size - 1 if isinstance(size, int) else None


def _pass_on(
    node: fx.Node, wanted: dict[fx.Node, Bounds], selected: dict[tuple[fx.Node, int], dict[int, Bounds]]
) -> None:
    """Pass the bounds of a call's output on to the arguments that all of its elements come from."""
    row, args, (low, high) = traits_of(node), node.args, wanted[node]
    source: Any = args[0] if args else None
    if row.kind is Kind.JOIN:
        for item in source:
            _narrow(wanted, item, (low, high))
    elif row.keeps_values or (row.kind is Kind.CAST and _is_integer(source) and _is_integer(node)):
        _narrow(wanted, source, (low, high))
    elif row.kind is Kind.SUM and type(args[1]) is int and not node.kwargs:
        shift = -args[1] if row.lowers else args[1]
        _narrow(wanted, source, (low - shift, None if high is None else high - shift))
    elif calls(node, aten.clamp) and has_role(node, SOFT_TOKENS):
        _narrow(wanted, source, (LEAST, high))  # what is below is looked up in another table
    elif calls(node, aten.bitwise_not) and _is_integer(node):
        _narrow(wanted, source, (LEAST if high is None else -1 - high, -1 - low))
    elif calls(node, aten.select) and isinstance(args[1], int) and isinstance(args[2], int):
        shape = source.meta["val"].shape
        axis, size = args[1] % len(shape), plain_size(shape[args[1]])
        if isinstance(size, int):
            selected.setdefault((source, axis), {})[args[2] % size] = (low, high)


def _is_integer(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.meta["val"].dtype in INTEGERS


def _from_selections(
    node: fx.Node, selected: dict[tuple[fx.Node, int], dict[int, Bounds]]
) -> Iterator[Bounds]:
    """Bounds of a node each of whose slices along an axis has its own: the widest of them."""
    for (source, axis), parts in selected.items():
        if source is node and len(parts) == plain_size(node.meta["val"].shape[axis]):
            tops = [high for _, high in parts.values() if high is not None]
            yield min(low for low, _ in parts.values()), max(tops) if len(tops) == len(parts) else None


def never_negative(program: Program, ids: fx.Node) -> bool:
    """Whether integers are known to be 0 or more.

    An input that is looked up as it is counts as such: a value below 0 is refused before the program runs.
    """
    source: Any = ids
    while traits_of(source).keeps_values or (
        traits_of(source).kind is Kind.CAST and _is_integer(source.args[0])
    ):
        source = source.args[0]
    return source.op == "placeholder" or _counts_up(program, source)


def chosen_by_scores(ids: fx.Node) -> bool:
    """Whether integers come from places among floating-point scores (topk, argmax) and were not lowered since."""
    stack, seen = [ids], {ids}
    while stack:
        item = stack.pop()
        value = item.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            continue
        if item.op == "placeholder" or traits_of(item).lowers:
            return False
        found = [source for source in item.all_input_nodes if source not in seen]
        seen.update(found)
        stack += found
    return True


def _counts_up(program: Program, value: Any) -> bool:
    """Whether a number or tensor holds no negative number; an input may hold one."""
    if isinstance(value, bool | int | float):
        return value >= 0
    if isinstance(value, list | tuple):
        return all(_counts_up(program, item) for item in value)
    if not isinstance(value, fx.Node) or value.op not in ("call_function", "get_attr"):
        return False
    if value.op == "get_attr":
        held = program.tensor(str(value.target))
        return held.device.type == "meta" or not held.numel() or bool((held >= 0).all())
    args, places = value.args, traits_of(value).not_negative
    if calls(value, aten.arange):  # (end), or (start, end, step)
        return len(args) == 1 or all(_counts_up(program, item) for item in (args[0], *args[2:3]))
    if places is None or not _counts_up(program, value.kwargs.get("alpha", 1)):  # a + alpha * b
        return False
    return all(len(args) > place and _counts_up(program, args[place]) for place in places)
