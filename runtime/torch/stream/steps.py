"""The steps of a graph that runs with streamed weights: calls, and products that are computed for some rows of a weight at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of
from bmgraph.runtime.torch.stream.schedule import Unit, Use

aten = torch.ops.aten
bmgraph = torch.ops.bmgraph

MAY_ALIAS = frozenset(
    {Kind.UNKNOWN, Kind.RESHAPE, Kind.LAYOUT, Kind.CAST, Kind.SPLIT, Kind.SELECTION, Kind.DROPOUT}
)
"""Calls whose result may lie in the memory of an argument."""

ALIGNED = 16
"""Rows of a part of a weight are a multiple of it, as far as they are more: kernels compute so many at a time."""

Rows = tuple[int, int]


@dataclass(frozen=True)
class Step:
    """One call; with `rows` the part of a product that these rows of the weight give, of which the `last` one completes it."""

    node: fx.Node
    rows: Rows | None = None
    last: bool = True


@dataclass
class Steps:
    """The steps of a graph in order; `uses` says what of the streamed weights each needs, `looked_up` holds the calls that read
    only some rows of their table."""

    steps: list[Step] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    at: dict[tuple[int, str], Use] = field(default_factory=dict)
    """(step, name of a tensor) -> the use that gives its values."""
    ending: dict[int, list[Use]] = field(default_factory=dict)
    products: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    """Calls that compute their weight from the rows of these tensors."""
    looked_up: set[fx.Node] = field(default_factory=set)
    skipped: set[fx.Node] = field(default_factory=set)
    """Expressions of weights alone that their readers compute for the rows that they need."""
    last_read: dict[int, list[fx.Node]] = field(default_factory=dict)
    """Step -> the nodes whose values it reads last."""


def row_leaves(node: Any) -> list[fx.Node] | None:
    """The tensors of which an expression computes each row from the rows of that number; None for another expression."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        return [node]
    if node.op != "call_function":
        return None
    if node.target is bmgraph.dequantize.default:
        sources, axis = list(node.all_input_nodes), node.args[2]
        one_each = axis == 0 and sources[-1].meta["val"].dim() == 1
    elif node.target is bmgraph.dequantize_blocks.default:
        sources = list(node.all_input_nodes)
        one_each = sources[0].meta["val"].dim() == 3
    else:
        sources = list(node.all_input_nodes)
        one_each = traits_of(node).kind is Kind.CAST and len(sources) == 1
    found = [row_leaves(item) for item in sources] if one_each else [None]
    return None if any(item is None for item in found) else [leaf for item in found for leaf in item or ()]


def make_steps(
    graph: fx.Graph, streamed: Mapping[str, torch.Tensor], piece: int, whole: Iterable[str]
) -> Steps:
    """The steps of a graph in eval form, whose weights `streamed` are in files.

    Weights of linears that are larger than `piece` bytes are used in parts of about as many; those in `whole` are read whole.
    """
    made = Steps()
    calls = [node for node in graph.nodes if node.op == "call_function"]
    kept_whole = set(whole)
    products = made.products
    for node in calls:
        place = {aten.linear.default: 1, aten.embedding.default: 0}.get(node.target)
        leaves = None if place is None else row_leaves(node.args[place])
        names = [] if leaves is None else [str(leaf.target) for leaf in leaves]
        if leaves is None or not any(name in streamed for name in names):
            continue
        if place == 0 and any(name in kept_whole for name in names):
            continue
        if len({leaf.meta["val"].shape[0] for leaf in leaves}) == 1:
            products[node] = leaves
    made.looked_up = {node for node in products if node.target is aten.embedding.default}
    for node in reversed(calls):
        users = list(node.users)
        if (
            row_leaves(node) is not None
            and users
            and all(_by_rows(user, node, products, made) for user in users)
        ):
            made.skipped.add(node)
    wanted: list[tuple[int, str, Unit]] = []
    for node in calls:
        if node in made.skipped:
            continue
        begin = len(made.steps)
        leaves = products.get(node, []) if node not in made.looked_up else []
        names = [name for leaf in leaves if (name := str(leaf.target)) in streamed]
        if not leaves:
            made.steps.append(Step(node))
        else:
            count = leaves[0].meta["val"].shape[0]
            parts = _parts(count, sum(streamed[name].nbytes for name in names), piece, kept_whole, names)
            for rows in parts:
                for name in names:
                    tensor = streamed[name]
                    size = (rows[1] - rows[0]) * (tensor.nbytes // max(1, count))
                    wanted.append((len(made.steps), name, Unit(name, rows[0], rows[1] - rows[0], size)))
                made.steps.append(Step(node, rows if len(parts) > 1 else None, rows == parts[-1]))
        for item in node.all_input_nodes:
            name = str(item.target)
            if (
                item.op == "get_attr"
                and name in streamed
                and not (node in products and item in products[node])
            ):
                unit = whole_unit(name, streamed[name])
                wanted += [(step, name, unit) for step in range(begin, len(made.steps))]
    wanted.sort(key=lambda item: item[0])
    _add_uses(made, wanted)
    _add_last_reads(made, graph)
    return made


def whole_unit(name: str, tensor: torch.Tensor) -> Unit:
    """All rows of a tensor."""
    return Unit(name, 0, len(tensor) if tensor.dim() else 1, tensor.nbytes)


def _by_rows(user: fx.Node, node: fx.Node, products: Mapping[fx.Node, Any], made: Steps) -> bool:
    """Whether a reader of an expression computes it by itself."""
    return user in made.skipped or (user in products and node in (user.args[1], user.args[0]))


def _parts(count: int, size: int, piece: int, whole: set[str], names: list[str]) -> list[Rows]:
    """The rows of a weight in parts of about `piece` bytes."""
    if size <= piece or any(name in whole for name in names):
        return [(0, count)]
    rows = max(1, piece * count // size)
    rows = rows // ALIGNED * ALIGNED or rows
    return [(first, min(first + rows, count)) for first in range(0, count, rows)]


def _add_uses(made: Steps, wanted: list[tuple[int, str, Unit]]) -> None:
    """One use for each unit and the steps that need it one after the other, without as much read in between."""
    place = {step.node: index for index, step in enumerate(made.steps)}
    open_uses: dict[Unit, tuple[int, int, list[int]]] = {}
    read_until: list[int] = [0]
    for _, _, unit in wanted:
        read_until.append(read_until[-1] + unit.bytes)
    last_of: dict[Unit, int] = {}
    for number, (step, _, unit) in enumerate(wanted):
        end = _last_alias(made.steps[step].node, place) if made.steps[step].rows is None else step
        end = max(end, step)
        before = open_uses.get(unit)
        if before is not None and (
            step <= before[1] or read_until[number] - read_until[last_of[unit] + 1] <= unit.bytes
        ):
            open_uses[unit] = (before[0], max(before[1], end), [*before[2], step])
        else:
            if before is not None:
                _close(made, unit, before)
            open_uses[unit] = (step, end, [step])
        last_of[unit] = number
    for unit, found in open_uses.items():
        _close(made, unit, found)
    made.uses.sort(key=lambda use: (use.begin, use.end))


def _close(made: Steps, unit: Unit, found: tuple[int, int, list[int]]) -> None:
    use = Use(unit, found[0], found[1])
    made.uses.append(use)
    made.ending.setdefault(use.end, []).append(use)
    for step in found[2]:
        made.at[step, unit.name] = use


def _last_alias(node: fx.Node, place: Mapping[fx.Node, int]) -> int:
    """The last step that reads what may lie in the memory of an argument of a call."""
    last, stack, seen = 0, [node], set[fx.Node]()
    while stack:
        item = stack.pop()
        if item in seen:
            continue
        seen.add(item)
        last = max(last, place.get(item, len(place) if item.op == "output" else 0))
        if traits_of(item).kind in MAY_ALIAS and item.op == "call_function":
            stack.extend(item.users)
    return last


def aliased_by_outputs(graph: fx.Graph) -> set[str]:
    """The tensors in whose memory an output may lie."""
    found = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            stack, seen = list(node.users), set[fx.Node]()
            while stack:
                item = stack.pop()
                if item.op == "output":
                    found.add(str(node.target))
                elif item not in seen and traits_of(item).kind in MAY_ALIAS:
                    seen.add(item)
                    stack.extend(item.users)
    return found


def _add_last_reads(made: Steps, graph: fx.Graph) -> None:
    last: dict[fx.Node, int] = {}
    for index, step in enumerate(made.steps):
        last[step.node] = index
        for item in step.node.all_input_nodes:
            last[item] = index
    for node in graph.nodes:
        if node.op == "output":
            for item in node.all_input_nodes:
                last.pop(item, None)
    for node, index in last.items():
        made.last_read.setdefault(index, []).append(node)
