"""A feed-forward node by node, for passes that rewrite its neurons: where they begin, what is done to each, where they end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.linears import linear_name
from bmgraph.analysis.structure.sites import FeedForward
from bmgraph.analysis.structure.value_origins import CASTS, DROPOUTS, ROUNDINGS, SELECTIONS, SPLITS, stem
from bmgraph.deltas.low_rank import delta_base
from bmgraph.ir.node_role import adds_delta, is_delta
from bmgraph.ir.program import FORWARD, Program


class NotNeurons(Exception):
    """A feed-forward whose neurons cannot be told apart; the text says why."""


@dataclass(frozen=True)
class Entrance:
    """The linear that makes values for the neurons: `node`, and for each neuron the output of it that is its own.

    `value` is the node that holds those outputs: `node` itself, the sum with its deltas, or the call that takes them
    from either.
    """

    node: fx.Node
    value: fx.Node
    rows: torch.Tensor


@dataclass(frozen=True)
class Neurons:
    """One use of a feed-forward.

    `entrances`: the gate's, where it has one, then up's; two of one linear where they are fused. `between`: the calls
    from there to what enters `down`, in order: each works on every neuron by itself. `changes`: what deltas add to what
    a linear in front gives, by linear, in the order that they are added in. `readers`: the calls of deltas on `down`
    that read neurons.
    """

    entrances: tuple[Entrance, ...]
    between: tuple[fx.Node, ...]
    down: fx.Node
    changes: Mapping[fx.Node, tuple[fx.Node, ...]]
    readers: tuple[fx.Node, ...]

    @property
    def linears(self) -> tuple[fx.Node, ...]:
        """The linears in front, each once."""
        return tuple(dict.fromkeys(item.node for item in self.entrances))


def neurons_of(program: Program, site: FeedForward) -> list[Neurons]:
    """All uses of a feed-forward; raises NotNeurons with the reason where one does more than work on its neurons."""
    if any(use.graph != FORWARD for use in site.uses):
        raise NotNeurons("another graph uses it too")
    nodes = {node.name: node for node in program.graph.nodes}
    return [_neurons(program, site, nodes[use.node]) for use in site.uses]


def _neurons(program: Program, site: FeedForward, down: fx.Node) -> Neurons:
    wanted = {site.up.linear} | ({site.gate.linear} if site.gate else set())
    linears, inside = _walk(program, down, wanted)
    totals = [node for node in inside if adds_delta(node)]
    takes = [node for node in inside if stem(node) in SELECTIONS | SPLITS | {"getitem"}]
    between = tuple(node for node in inside if node not in takes and node not in totals)
    known = {*linears, *inside, down}
    strangers = [user for node in (*linears, *inside) for user in node.users if user not in known]
    for user in strangers:
        if not (is_delta(user) and user.meta.get("site") == linear_name(program, down)):
            raise NotNeurons(f"{user.name} reads its neurons too")
    for node in between:
        _check_pointwise(node, known)
    entrances = []
    for part in (site.gate, site.up):
        if part is not None:
            node = next(item for item in linears if linear_name(program, item) == part.linear)
            entrances.append(_entrance(node, _last_total(node, totals), takes, set(between), part.runs))
    changes: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for total in totals:
        linear = delta_base(total)
        changes[linear] = (*changes.get(linear, ()), total.args[1])  # type: ignore[arg-type]
    return Neurons(tuple(entrances), between, down, changes, tuple(dict.fromkeys(strangers)))


def _walk(program: Program, down: fx.Node, wanted: set[str]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The linears that `down` reads, and the calls between, in order; of deltas between only where they add."""
    linears: set[fx.Node] = set()
    inside: set[fx.Node] = set()
    stack = [down.args[0]]
    while stack:
        node = stack.pop()
        assert isinstance(node, fx.Node)
        if node in linears or node in inside or node.op == "get_attr":
            continue
        if node.op == "placeholder" or (stem(node) == "linear" and linear_name(program, node) not in wanted):
            raise NotNeurons(f"{node.name} enters between its linears")
        if stem(node) == "linear":
            linears.add(node)
            continue
        inside.add(node)
        stack.extend([node.args[0]] if adds_delta(node) else node.all_input_nodes)
    order = [node for node in program.graph.nodes if node in linears or node in inside]
    return [node for node in order if node in linears], [node for node in order if node in inside]


def _last_total(linear: fx.Node, totals: Sequence[fx.Node]) -> fx.Node:
    """What a linear gives with all its deltas, `totals` being in order."""
    return next((total for total in reversed(totals) if delta_base(total) is linear), linear)


def _check_pointwise(node: fx.Node, known: set[fx.Node]) -> None:
    name = stem(node)
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    if not (pointwise or name in DROPOUTS | ROUNDINGS | CASTS):
        raise NotNeurons(f"{node.name} does not work on each neuron by itself")
    for item in node.all_input_nodes:
        if item not in known and item.meta["val"].numel() != 1:
            raise NotNeurons(
                f"{node.name} brings in {item.name}, which has values of its own for its neurons"
            )


def _entrance(
    linear: fx.Node,
    given: fx.Node,
    takes: list[fx.Node],
    between: set[fx.Node],
    runs: tuple[tuple[int, int], ...],
) -> Entrance:
    """Which outputs of a linear, `given` with its deltas, are the neurons', read from what takes do to a row of numbers."""
    value = linear.meta["val"]
    numbers = torch.arange(value.shape[-1]).reshape([1] * (value.dim() - 1) + [-1])
    if between.intersection(given.users) or not takes:
        return Entrance(linear, given, numbers.flatten())
    results: dict[fx.Node, Any] = {given: numbers}
    wanted = {index for start, stop in runs for index in range(start, stop)}
    for node in takes:
        if not all(item in results for item in node.all_input_nodes):
            continue
        assert callable(node.target)
        args: Any = fx.map_arg((node.args, node.kwargs), results.__getitem__)
        results[node] = node.target(*args[0], **args[1])
        found = results[node]
        if between.intersection(node.users) and isinstance(found, torch.Tensor):
            rows = found.flatten()
            if set(rows.tolist()) == wanted:
                return Entrance(linear, node, rows)
    raise NotNeurons(f"the outputs of {linear.name} are not taken apart in a way that can be read")
