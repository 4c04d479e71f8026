"""Locates the neurons of a feed-forward in the graph: input projections, elementwise calls, down projection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.linears import linear_name
from bmgraph.analysis.structure.sites import FeedForward
from bmgraph.deltas.delta_calls import changed_linear, delta_base
from bmgraph.ir.evaluation import run_call
from bmgraph.ir.node_role import ends_delta, is_delta
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import is_elementwise, traits_of, unsaid_dims


class NotSplittable(Exception):
    """A feed-forward that cannot be split into experts; the message says why."""


@dataclass(frozen=True)
class InputProjection:
    """A linear that computes values of the neurons. `rows` i64[N]: the output of `linear` that belongs to each neuron.

    `value` is the node with those outputs: `linear` itself, the sum with its deltas, or a call that takes a part of either.
    """

    linear: fx.Node
    value: fx.Node
    rows: torch.Tensor


@dataclass(frozen=True)
class FeedForwardUse:
    """One use of a feed-forward.

    `projections`: the gate's, if there is one, then up's; both have the same linear where they are fused. `elementwise`: the
    calls from there to the input of `down`, in order; each computes every neuron alone. `delta_terms`: for each input linear,
    the terms that deltas add to its output, in order. `delta_readers`: calls of deltas on `down` that read neurons.
    """

    projections: tuple[InputProjection, ...]
    elementwise: tuple[fx.Node, ...]
    down: fx.Node
    totals: Mapping[fx.Node, tuple[fx.Node, ...]]
    delta_readers: tuple[fx.Node, ...]

    @property
    def linears(self) -> tuple[fx.Node, ...]:
        """The input linears, each once."""
        return tuple(dict.fromkeys(item.linear for item in self.projections))

    def at(self, nodes: Mapping[str, fx.Node]) -> FeedForwardUse:
        """The same use in a copy of the program, whose nodes are given by name."""

        def found(items: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
            return tuple(nodes[item.name] for item in items)

        projections = (
            InputProjection(nodes[item.linear.name], nodes[item.value.name], item.rows)
            for item in self.projections
        )
        totals = {nodes[linear.name]: found(items) for linear, items in self.totals.items()}
        return FeedForwardUse(
            tuple(projections),
            found(self.elementwise),
            nodes[self.down.name],
            totals,
            found(self.delta_readers),
        )


def feedforward_uses(program: Program, site: FeedForward) -> list[FeedForwardUse]:
    """All uses of a feed-forward; raises NotSplittable where its neurons are not independent of each other."""
    nodes = {node.name: node for node in program.graph.nodes}
    return [_use(program, site, nodes[use.node]) for use in site.uses]


def _use(program: Program, site: FeedForward, down: fx.Node) -> FeedForwardUse:
    wanted = {site.up.linear} | ({site.gate.linear} if site.gate else set())
    linears, inner = _walk(program, down, wanted)
    totals = [node for node in inner if ends_delta(node)]
    takes = [node for node in inner if traits_of(node).kind in (Kind.SELECTION, Kind.SPLIT)]
    elementwise = tuple(node for node in inner if node not in takes and node not in totals)
    known = {*linears, *inner, down}
    outside_readers = [user for node in (*linears, *inner) for user in node.users if user not in known]
    for user in outside_readers:
        if not (is_delta(user) and user.meta.get("site") == linear_name(program, down)):
            raise NotSplittable(f"{user.name} reads its neurons too")
    for node in elementwise:
        _check_pointwise(node, known)
    projections = []
    for part in (site.gate, site.up):
        if part is not None:
            node = next(item for item in linears if linear_name(program, item) == part.linear)
            projections.append(
                _projection(node, _last_total(node, totals), takes, set(elementwise), part.runs)
            )
    by_linear: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for total in totals:
        linear = changed_linear(total)
        if linear is down or total.target is not torch.ops.aten.add.Tensor:
            raise NotSplittable(
                f"the delta on {linear_name(program, linear)} does not add to its output, and experts take only sums: merge it"
            )
        by_linear[linear] = (*by_linear.get(linear, ()), total)
    return FeedForwardUse(
        tuple(projections), elementwise, down, by_linear, tuple(dict.fromkeys(outside_readers))
    )


def _walk(program: Program, down: fx.Node, wanted: set[str]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The input linears of `down` and the calls between them and `down`, in order. Of deltas between, only the sums."""
    linears: set[fx.Node] = set()
    inner: set[fx.Node] = set()
    stack = [down.args[0]]
    while stack:
        node = stack.pop()
        assert isinstance(node, fx.Node)
        if node in linears or node in inner or node.op == "get_attr":
            continue
        if node.op == "placeholder" or (
            traits_of(node).kind is Kind.LINEAR and linear_name(program, node) not in wanted
        ):
            raise NotSplittable(f"{node.name} is read by its elementwise calls")
        if traits_of(node).kind is Kind.LINEAR:
            linears.add(node)
            continue
        inner.add(node)
        stack.extend([node.args[0]] if ends_delta(node) else node.all_input_nodes)
    order = [node for node in program.graph.nodes if node in linears or node in inner]
    return [node for node in order if node in linears], [node for node in order if node in inner]


def _last_total(linear: fx.Node, totals: Sequence[fx.Node]) -> fx.Node:
    """The output of a linear with all its deltas; `totals` are in order."""
    return next((total for total in reversed(totals) if delta_base(total) is linear), linear)


def _check_pointwise(node: fx.Node, known: set[fx.Node]) -> None:
    if not (is_elementwise(node) or traits_of(node).kind is Kind.ROUNDING):
        raise NotSplittable(f"{node.name} does not compute each neuron alone{unsaid_dims(node)}")
    for item in node.all_input_nodes:
        if item not in known and item.meta["val"].numel() != 1:
            raise NotSplittable(f"{node.name} reads {item.name}, which is not a scalar and cannot be split")


def _projection(
    linear: fx.Node,
    output: fx.Node,
    takes: list[fx.Node],
    elementwise: set[fx.Node],
    runs: tuple[tuple[int, int], ...],
) -> InputProjection:
    """Which outputs of a linear belong to the neurons; `output` is its output with its deltas.

    The calls that take parts of the output are run on the row numbers, and the one that gives the rows of `runs` is it.
    """
    value = linear.meta["val"]
    numbers = torch.arange(value.shape[-1]).reshape([1] * (value.dim() - 1) + [-1])
    if elementwise.intersection(output.users) or not takes:
        return InputProjection(linear, output, numbers.flatten())
    results: dict[fx.Node, Any] = {output: numbers}
    wanted = {index for start, stop in runs for index in range(start, stop)}
    for node in takes:
        if not all(item in results for item in node.all_input_nodes):
            continue
        result = results[node] = run_call(node, results.__getitem__)
        if elementwise.intersection(node.users) and isinstance(result, torch.Tensor):
            rows = result.flatten()
            if set(rows.tolist()) == wanted:
                return InputProjection(linear, node, rows)
    raise NotSplittable(f"the outputs of {linear.name} are split by calls that are not supported")
