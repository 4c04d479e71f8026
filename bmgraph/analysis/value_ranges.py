"""Finds which integers an input may hold: those that the tables hold in which the dataflow looks them up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.value_origins import stem
from bmgraph.ir.matching import plain_size
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import TensorSpec

Bounds = tuple[int, int | None]
"""The smallest and the largest value, both included; None if there is no known largest one."""

KEEPS = frozenset(
    {
        "reshape", "view", "unsqueeze", "squeeze", "flatten", "unflatten", "transpose", "permute", "t", "expand",
        "repeat", "flip", "roll", "clone", "contiguous", "alias", "detach",
    }
)  # fmt: skip
"""Operators whose output holds every element of their first argument, and no other value."""

ALONG_AXIS = frozenset({"gather", "index_select", "scatter", "scatter_add", "index_add"})
"""Operators (x, axis, indices, ...) whose indices are from 0 to below the size of the axis."""

NEVER_NEGATIVE = frozenset(
    {
        "sym_size",
        "ones",
        "zeros",
        "ones_like",
        "zeros_like",
        "abs",
        "argmax",
        "argmin",
        "argsort",
        "nonzero",
        "bucketize",
    }
)
"""Operators that give no negative number."""

BY_ARGUMENT = {
    **dict.fromkeys(
        [*KEEPS, "to", "slice", "select", "index_select", "gather", "narrow", "cumsum", "sum"], 0
    ),
    **dict.fromkeys(["clamp", "clamp_min", "full", "full_like", "remainder"], 1),
}
"""Operators that give no negative number where one argument has none -> its index."""

SUMS_AND_PRODUCTS = frozenset({"add", "mul", "floor_divide", "maximum", "minimum"})
"""Operators that give no negative number where no argument has one."""

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
    kind, args = stem(node), node.args
    if kind in ("embedding", "embedding_bag"):
        yield args[1], _below(args[0], 0)
    elif kind in ALONG_AXIS and isinstance(args[1], int):
        yield args[2], _below(args[0], args[1])
    elif kind == "one_hot" and isinstance(args[1], int) and args[1] > 0:
        yield args[0], (0, args[1] - 1)
    elif kind == "experts_linear":
        yield args[2], _below(args[1], 0)
    elif node.target is torch.ops.aten.index.Tensor:
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
    kind, args, (low, high) = stem(node), node.args, wanted[node]
    source: Any = args[0] if args else None
    if kind in ("cat", "stack"):
        for item in source:
            _narrow(wanted, item, (low, high))
    elif kind in KEEPS or (kind == "to" and _is_integer(source) and _is_integer(node)):
        _narrow(wanted, source, (low, high))
    elif kind in ("add", "sub") and type(args[1]) is int and not node.kwargs:
        shift = args[1] if kind == "add" else -args[1]
        _narrow(wanted, source, (low - shift, None if high is None else high - shift))
    elif kind == "select" and isinstance(args[1], int) and isinstance(args[2], int):
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
    while source.op == "call_function" and (
        stem(source) in KEEPS or (stem(source) == "to" and _is_integer(source.args[0]))
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
        if item.op == "placeholder" or (item.op == "call_function" and stem(item) in ("sub", "neg", "rsub")):
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
    kind, args = stem(value), value.args
    if kind in NEVER_NEGATIVE:
        return True
    if kind in BY_ARGUMENT:
        place = BY_ARGUMENT[kind]
        return len(args) > place and _counts_up(program, args[place])
    if kind == "arange":  # (end), or (start, end, step)
        return len(args) == 1 or all(_counts_up(program, item) for item in (args[0], *args[2:3]))
    if kind in SUMS_AND_PRODUCTS:
        return all(_counts_up(program, item) for item in args if not isinstance(item, str))
    if kind == "where":
        return all(_counts_up(program, item) for item in args[1:])
    if kind == "masked_fill":
        return _counts_up(program, args[0]) and _counts_up(program, args[2])
    return False
