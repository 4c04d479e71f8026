"""Coupled dimensions: what has to shrink together when neurons or heads are taken out of a model.

A graph (networkx) has a node for every dimension of every tensor and an edge wherever an operator ties two of them: a
linear ties the last dimension of its input to the columns of its weight, a sum the dimensions of both sides, a reshape
those that an element keeps its place in. Units (a neuron, a head) are numbers given to the indices of one dimension; they
spread through its connected component, index by index, as far as they reach: a reshape ties a head's outputs to the heads
and to the places within a head, and the number goes on to the first. What carries a number then belongs to that unit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import fx

from bmgraph.analysis.coupling.index_tracing import Movement, moves, sources
from bmgraph.analysis.coupling.op_rules import TURNS, WHOLE, Place, rank, ties
from bmgraph.analysis.structure.partial_evaluation import Region
from bmgraph.analysis.structure.value_origins import ATTENTIONS, PRODUCTS, stem
from bmgraph.ir.program import Program

NONE = -1
"""The number of an index that belongs to no unit."""

Labels = torch.Tensor
"""i64[size]: the unit of every index of a dimension, NONE for none."""

MIXING = PRODUCTS | ATTENTIONS | frozenset({"linear", "mm", "conv1d", "conv2d", "conv3d"})
"""Calls that multiply with weights, or values with each other: nothing before the first of them is a unit's own."""


@dataclass
class Spread:
    """What belongs to the units of one site. `labels`: dimension -> the unit of each index. `cuts`: operands that are
    made of positions or masks alone, (who reads it, operand, dimension) -> units: they are left whole, and picked from."""

    labels: dict[Place, Labels] = field(default_factory=dict)
    cuts: dict[tuple[fx.Node, fx.Node, int], Labels] = field(default_factory=dict)


class Uncoupled(Exception):
    """Units cannot be taken out; the message says what is in the way."""


class Coupling:
    """The coupled dimensions of the main graph of a program."""

    def __init__(self, program: Program) -> None:
        self._region = Region(program)
        self._aside = _aside(program.graph)
        self.movement = Movement(program, self._region)
        self.graph = self._build(program.graph)

    def _build(self, graph: fx.Graph) -> nx.Graph:
        """Dimensions of one index are left out: they broadcast, and nothing can be taken out of them."""
        found = nx.Graph()
        for node in graph.nodes:
            if moves(node) and stem(node) not in TURNS:
                pairs, moved = self._moved(node), True
            else:
                pairs, moved = ties(node), False
            for first, second in pairs:
                if self._has_several(first) and self._has_several(second):
                    found.add_edge(first, second, by=node, moved=moved)
        return found

    def _has_several(self, place: Place) -> bool:
        return place[1] == WHOLE or self.size(place) != 1

    def size(self, place: Place) -> int:
        """How many indices a dimension has, dynamic ones at the value of an evaluation."""
        node, dim = place
        return self._region.shape(node)[dim]

    def spread(self, seeds: Mapping[Place, Labels]) -> Spread:
        """Everything that the units of `seeds` reach. Raises Uncoupled where an operator, or an output of the program,
        needs them all."""
        return _Spreading(self).run(seeds)

    def is_aside(self, node: fx.Node) -> bool:
        """Whether no product takes part in a value and no weight alone makes it, as for masks and biases of positions:
        others may read it too."""
        return node in self._aside

    def _moved(self, node: fx.Node) -> list[tuple[Place, Place]]:
        """(dimension of a source, dimension of the output) wherever the first decides on the index in the second."""
        pairs: list[tuple[Place, Place]] = []
        for source in sources(node):
            for dim, size in enumerate(self._region.shape(source)):
                if size == 1:
                    continue  # it broadcasts
                found = None if _strides(node, dim) else self.movement.coordinates(node, source, dim)
                axes = [] if found is None else [axis for axis in range(found.dim()) if _varies(found, axis)]
                pairs += [((source, dim), (node, axis)) for axis in axes or [WHOLE]]
        return pairs


class _Spreading:
    """One spreading of numbers."""

    def __init__(self, coupling: Coupling) -> None:
        self._coupling = coupling
        self._found = Spread()
        self._waiting: deque[Place] = deque()

    def run(self, seeds: Mapping[Place, Labels]) -> Spread:
        for place, labels in seeds.items():
            self._put(place, labels)
        while self._waiting:
            place = self._waiting.popleft()
            moved: dict[fx.Node, list[Place]] = {}
            for other, edge in self._coupling.graph.adj.get(place, {}).items():
                if edge["moved"]:
                    moved.setdefault(edge["by"], []).append(other)
                else:
                    self._tie(place, other, edge["by"])
            for by, others in moved.items():
                self._move(place, others, by)
        return self._found

    def _tie(self, place: Place, other: Place, by: fx.Node) -> None:
        node, dim = other
        labels = self._found.labels[place]
        if dim == WHOLE:
            raise Uncoupled(_needs_all(by))
        if node is not by and self._coupling.is_aside(node):
            if isinstance(node.meta["val"].shape[dim], torch.SymInt):
                raise Uncoupled(f"{_where(by)} reads a mask or positions along a dimension of no fixed size")
            self._found.cuts[by, node, dim] = labels
        else:
            self._put(other, labels)

    def _put(self, place: Place, labels: Labels) -> None:
        before = self._found.labels.get(place)
        if before is not None:
            clash = (before != labels) & (before != NONE) & (labels != NONE)
            if bool(clash.any()):
                raise Uncoupled(f"{_where(place[0])} mixes several of them")
            labels = torch.where(before != NONE, before, labels)
            if torch.equal(labels, before):
                return
        if bool((labels != NONE).any()):
            self._found.labels[place] = labels
            self._waiting.append(place)

    def _move(self, place: Place, others: list[Place], by: fx.Node) -> None:
        if place[0] is by:
            self._backward(place, others, by)
        else:
            self._forward(place, others, by)

    def _forward(self, place: Place, others: list[Place], by: fx.Node) -> None:
        """From a source of a movement to its output."""
        found = self._coupling.movement.coordinates(by, *place)
        if found is None:
            raise Uncoupled(_needs_all(by))
        labels = _look_up(self._found.labels[place], found)
        if not bool((labels != NONE).any()):
            return
        for other in others:
            along = _along(labels, other[1]) if other[1] != WHOLE else None
            if along is not None:
                self._put(other, along)
                return
        raise Uncoupled(_needs_all(by))

    def _backward(self, place: Place, others: list[Place], by: fx.Node) -> None:
        """From the output of a movement to each of its sources."""
        shape = [-1 if axis == place[1] else 1 for axis in range(by.meta["val"].dim())]
        spread = self._found.labels[place].reshape(shape)
        for source in dict.fromkeys(node for node, _ in others):
            reached, explained = False, False
            for other in others:
                if other[0] is not source or explained:
                    continue
                found = self._coupling.movement.coordinates(by, *other)
                if found is None:
                    continue
                known = (found != NONE) & (spread.expand(found.shape) != NONE)
                reached |= bool(known.any())
                labels = _source_labels(
                    found[known], spread.expand(found.shape)[known], self._coupling.size(other)
                )
                if labels is not None:
                    explained = True
                    self._put(other, labels)
            if reached and not explained:
                raise Uncoupled(_needs_all(by))


def _strides(node: fx.Node, dim: int) -> bool:
    """Whether a slice leaves out some between: where those are that stay cannot be said by a slice of fewer."""
    if stem(node) != "slice" or len(node.args) < 5 or node.args[4] == 1:
        return False
    axis: Any = node.args[1]
    return int(axis) % rank(node) == dim


def _varies(values: torch.Tensor, axis: int) -> bool:
    return values.shape[axis] > 1 and bool((values != values.narrow(axis, 0, 1)).any())


def _look_up(labels: Labels, coordinates: torch.Tensor) -> torch.Tensor:
    """The unit of every element whose index is given."""
    return torch.where(coordinates != NONE, labels[coordinates.clamp(min=0)], NONE)


def _along(labels: torch.Tensor, axis: int) -> Labels | None:
    """The units along one dimension, None where they depend on others too. What is of no unit goes with its index."""
    rows = labels.movedim(axis, 0).reshape(labels.shape[axis], -1)
    found = rows.amax(1)
    return found if bool(((rows == found[:, None]) | (rows == NONE)).all()) else None


def _source_labels(coordinates: torch.Tensor, labels: torch.Tensor, size: int) -> Labels | None:
    """The unit of every index, told from elements that came from it; None where two of them disagree."""
    found = torch.full((size,), NONE)
    found[coordinates] = labels
    return found if torch.equal(found[coordinates], labels) else None


def _aside(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that no product takes part in, but for those that are made of weights alone."""
    weights: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (inputs and weights.issuperset(inputs)):
            weights.add(node)
        elif stem(node) not in MIXING and all(item in weights or item in found for item in inputs):
            found.add(node)
    return found


def _where(node: fx.Node) -> str:
    """An operator and the module that it is of."""
    scope = node.meta.get("scope")
    return f"operator {stem(node)}" + (f" in {scope}" if scope else "")


def _needs_all(node: fx.Node) -> str:
    return "they are an output of the program" if node.op == "output" else f"{_where(node)} needs all of them"
