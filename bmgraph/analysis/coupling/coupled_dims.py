"""Finds everything that must shrink together when neurons, heads or channels are removed.

A graph (networkx) has one node per dimension of every tensor, and an edge wherever an operator couples two of them: a
linear couples the last dimension of its input with the columns of its weight, a sum couples the dimensions of its
operands, a reshape couples the dimensions that decide where an element goes. Units (neurons, heads) are numbers that
label the indices of one dimension. Labels propagate through the connected component, index by index: where a reshape
splits outputs into [heads, head size], the label of a head stays with its index in the first. Whatever carries a label
belongs to that unit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import networkx as nx
import torch
from torch import fx

from bmgraph.analysis.coupling.index_tracing import IndexTracer, is_movement, moved_inputs
from bmgraph.analysis.coupling.op_rules import WHOLE, DimRef, coupled_pairs, rank
from bmgraph.analysis.structure.partial_evaluation import PartialEvaluator
from bmgraph.analysis.structure.value_origins import stem
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.matching import plain_size
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Dims, Kind
from bmgraph.ops.traits import calls, traits_of, unsaid_dims

aten = torch.ops.aten

NONE = -1
"""Label of an index that belongs to no unit."""

Labels = torch.Tensor
"""i64[size]: the unit of each index of a dimension, or NONE."""

MIXING = frozenset({Kind.BATCHED_PRODUCT, Kind.PRODUCT, Kind.ATTENTION, Kind.LINEAR, Kind.CONVOLUTION})
"""Calls that multiply by weights, or values by each other. No value before the first of them belongs to a unit.

Experts are left out on purpose: what they give in front of every linear, by ids that no router chose, stays whole and is cut
where it is read, since removing units from the weights of experts is not known (`op_rules`)."""


@dataclass
class Spread:
    """Everything that belongs to the units of one site.

    `labels`: dimension -> the unit of each index. `cuts`: (reader, operand, dimension) -> units, for operands that are
    computed from positions or masks alone. Such an operand stays whole; each reader takes the indices that it needs.
    `outputs`: dimensions of values that the program returns, which keep their size (`Coupling.spread`).
    """

    labels: dict[DimRef, Labels] = field(default_factory=dict)
    cuts: dict[tuple[fx.Node, fx.Node, int], Labels] = field(default_factory=dict)
    outputs: dict[DimRef, Labels] = field(default_factory=dict)


class CouplingError(Exception):
    """Units cannot be removed; the message says what prevents it."""


class Coupling:
    """Coupled dimensions of the main graph of a program.

    `graph`: nodes are (fx node, dimension); each edge has `by`, the node that couples them, and `moved`, whether that
    node only moves elements. With `tables`, what is looked up in tables of parameters belongs to units (the channels of
    embeddings); else it stays whole, as a bias of positions that several sites read.
    """

    def __init__(self, program: Program, tables: bool = False) -> None:
        self._evaluator = PartialEvaluator(program)
        self._side_inputs = _side_inputs(program, tables)
        self.tracer = IndexTracer(program, self._evaluator)
        self.steps: dict[DimRef, list[tuple[fx.Node, int]]] = {}
        """Dimension -> the slices with a step that read it, each with its step."""
        self.graph = self._build(program.graph)

    def _build(self, graph: fx.Graph) -> nx.Graph:
        """Leaves out dimensions of size 1: they broadcast, and nothing can be removed from them."""
        coupled = nx.Graph()
        for node in graph.nodes:
            if is_movement(node) and traits_of(node).dims is not Dims.PERMUTED:
                pairs, moved = self._moved_pairs(node), True
            else:
                pairs, moved = coupled_pairs(node), False
            for first, second in pairs:
                if self._has_several(first) and self._has_several(second):
                    coupled.add_edge(first, second, by=node, moved=moved)
        return coupled

    def _has_several(self, ref: DimRef) -> bool:
        return ref[1] == WHOLE or self.size(ref) != 1

    def size(self, ref: DimRef) -> int:
        """Size of a dimension; dynamic sizes at the value used for evaluation."""
        node, dim = ref
        return self._evaluator.shape(node)[dim]

    def spread(self, seeds: Mapping[DimRef, Labels], keep_outputs: bool = False) -> Spread:
        """Propagate the labels of `seeds` to everything that depends on them, index by index.

        Raises CouplingError if an operator, or an output of the program, needs all indices of a labelled dimension; with
        `keep_outputs` an output does not, since it keeps its size: what is gone is zero there.
        """
        return _Propagation(self, keep_outputs).run(seeds)

    def inseparable(self, seeds: Mapping[DimRef, Labels]) -> dict[DimRef, Labels]:
        """The seeds with one label, from 0 on, for those that some operator mixes, such as a rotary pair: they can only go
        together."""
        found = dict(seeds)
        while True:
            mixed = nx.Graph()
            _Propagation(self, mixed=mixed).run(found)
            if not mixed.edges:
                return found
            names = {label: min(group) for group in nx.connected_components(mixed) for label in group}
            kept = sorted(
                {names.get(int(label), int(label)) for item in found.values() for label in item} - {NONE}
            )
            numbers = {NONE: NONE, **{label: number for number, label in enumerate(kept)}}
            found = {
                ref: torch.tensor([numbers[names.get(label, label)] for label in labels.tolist()])
                for ref, labels in found.items()
            }

    def is_side_input(self, node: fx.Node) -> bool:
        """Whether a value is computed without any product and not from weights alone, such as a mask or a position bias.

        Several sites may share such a value.
        """
        return node in self._side_inputs

    def _moved_pairs(self, node: fx.Node) -> list[tuple[DimRef, DimRef]]:
        """Pairs (input dimension, output dimension) where the index in the input depends on the index in the output."""
        pairs: list[tuple[DimRef, DimRef]] = []
        for source in moved_inputs(node):
            for dim, size in enumerate(self._evaluator.shape(source)):
                if size == 1:
                    continue  # it broadcasts
                step = _step(node, dim)
                if step > 1 and _takes_of_each_block(node, step, size):
                    self.steps.setdefault((source, dim), []).append((node, step))
                    step = 1
                indices = None if step > 1 else self.tracer.source_indices(node, source, dim)
                axes = (
                    []
                    if indices is None
                    else [axis for axis in range(indices.dim()) if _varies(indices, axis)]
                )
                pairs += [((source, dim), (node, axis)) for axis in axes or [WHOLE]]
        return pairs


class _Propagation:
    """One propagation of labels: a worklist over the coupling graph.

    With `mixed`, units that some operator mixes are no error, but edges there.
    """

    def __init__(self, coupling: Coupling, keep_outputs: bool = False, mixed: nx.Graph | None = None) -> None:
        self._coupling = coupling
        self._keep_outputs, self._mixed = keep_outputs, mixed
        self._spread = Spread()
        self._waiting: deque[DimRef] = deque()

    def run(self, seeds: Mapping[DimRef, Labels]) -> Spread:
        """Propagate until nothing changes."""
        for ref, labels in seeds.items():
            self._put(ref, labels)
        while self._waiting:
            ref = self._waiting.popleft()
            moved: dict[fx.Node, list[DimRef]] = {}
            for other, edge in self._coupling.graph.adj.get(ref, {}).items():
                if edge["moved"]:
                    moved.setdefault(edge["by"], []).append(other)
                else:
                    self._copy(ref, other, edge["by"])
            for by, others in moved.items():
                self._move(ref, others, by)
        for ref, slices in self._coupling.steps.items():
            for by, step in slices if ref in self._spread.labels else ():
                self._check_blocks(ref, by, step)
        return self._spread

    def _check_blocks(self, ref: DimRef, by: fx.Node, step: int) -> None:
        """A slice with a step takes the same elements as before only where whole blocks of that many are removed."""
        blocks = self._spread.labels[ref].reshape(-1, step)
        first = blocks[:, :1].expand_as(blocks)
        differ = blocks != first
        if bool(differ.any()):
            self._mix(first[differ], blocks[differ], _needs_all(by))

    def _mix(self, one: Labels, other: Labels, why: str) -> None:
        """Units that cannot be told apart. Raises CouplingError, unless they are collected."""
        if self._mixed is None or bool(((one == NONE) | (other == NONE)).any()):
            raise CouplingError(why)
        self._mixed.add_edges_from(zip(one.tolist(), other.tolist()))

    def _copy(self, ref: DimRef, other: DimRef, by: fx.Node) -> None:
        """From one dimension to another with the same indices."""
        node, dim = other
        labels = self._spread.labels[ref]
        if dim == WHOLE:
            if by.op != "output" or not self._keep_outputs:
                raise CouplingError(_needs_all(by))
            self._spread.outputs[ref] = labels
        elif node is not by and self._coupling.is_side_input(node):
            if not isinstance(plain_size(node.meta["val"].shape[dim]), int):
                raise CouplingError(
                    f"{where(by)} reads a mask or positions along a dimension of no fixed size"
                )
            self._spread.cuts[by, node, dim] = labels
        else:
            self._put(other, labels)

    def _put(self, ref: DimRef, labels: Labels) -> None:
        """Add labels to a dimension, and queue it if that changes anything."""
        before = self._spread.labels.get(ref)
        if before is not None:
            clash = (before != labels) & (before != NONE) & (labels != NONE)
            if bool(clash.any()):
                self._mix(before[clash], labels[clash], f"{where(ref[0])} mixes several of them")
            labels = torch.where(before != NONE, before, labels)
            if torch.equal(labels, before):
                return
        if bool((labels != NONE).any()):
            self._spread.labels[ref] = labels
            self._waiting.append(ref)

    def _move(self, ref: DimRef, others: list[DimRef], by: fx.Node) -> None:
        """Through a data movement, in either direction."""
        if ref[0] is by:
            self._backward(ref, others, by)
        else:
            self._forward(ref, others, by)

    def _forward(self, ref: DimRef, others: list[DimRef], by: fx.Node) -> None:
        """From an input of a movement to its output."""
        indices = self._coupling.tracer.source_indices(by, *ref)
        if indices is None:
            raise CouplingError(_needs_all(by))
        labels = _look_up(self._spread.labels[ref], indices)
        if not bool((labels != NONE).any()):
            return
        axes = [other for other in others if other[1] != WHOLE]
        for other in axes:
            along = _along(labels, other[1])
            if along is not None:
                self._put(other, along)
                return
        if self._mixed is None or not axes:
            raise CouplingError(_needs_all(by))
        longest = max(axes, key=self._coupling.size)
        places = _numbered(labels.shape, longest[1])[labels != NONE]
        self._put(longest, self._joined(places, labels[labels != NONE], self._coupling.size(longest)))

    def _backward(self, ref: DimRef, others: list[DimRef], by: fx.Node) -> None:
        """From the output of a movement to each of its inputs."""
        shape = [-1 if axis == ref[1] else 1 for axis in range(by.meta["val"].dim())]
        output_labels = self._spread.labels[ref].reshape(shape)
        if _is_repeated(by, ref[1], self._spread.labels[ref]):
            return
        for source in dict.fromkeys(node for node, _ in others):
            reached, labelled = False, False
            longest: tuple[int, DimRef, torch.Tensor, torch.Tensor] | None = None
            for other in others:
                if other[0] is not source or labelled:
                    continue
                indices = self._coupling.tracer.source_indices(by, *other)
                if indices is None:
                    continue
                wanted = output_labels.expand(indices.shape)
                traced = (indices != NONE) & (wanted != NONE)
                reached |= bool(traced.any())
                size = self._coupling.size(other)
                if longest is None or size > longest[0]:
                    longest = size, other, indices[traced], wanted[traced]
                labels = _source_labels(indices[traced], wanted[traced], size)
                if labels is not None:
                    labelled = True
                    self._put(other, labels)
            if reached and not labelled:
                if self._mixed is None or longest is None:
                    raise CouplingError(_needs_all(by))
                size, other, places, units = longest
                self._put(other, self._joined(places, units, size))

    def _joined(self, places: torch.Tensor, units: Labels, size: int) -> Labels:
        """One unit for each index of a dimension, of several that are found at it: these are mixed there."""
        found = torch.full((size,), NONE).scatter_reduce(0, places, units, "amax")
        differ = found[places] != units
        self._mix(found[places][differ], units[differ], "")
        return found


def _step(node: fx.Node, dim: int) -> int:
    """The step of a slice along a dimension; 1 for any other call."""
    if not calls(node, aten.slice) or len(node.args) < 5:
        return 1
    axis, step = node.args[1], node.args[4]
    return int(step) if int(axis) % rank(node) == dim else 1  # type: ignore[arg-type]


def _takes_of_each_block(node: fx.Node, step: int, size: int) -> bool:
    """Whether a slice with a step takes one element of every block of `step` elements."""
    start, stop = node.args[2] or 0, node.args[3]
    ends = stop is None or (isinstance(stop, int) and stop >= size)
    return isinstance(start, int) and 0 <= start < step and ends and size % step == 0


def _is_repeated(node: fx.Node, dim: int, labels: Labels) -> bool:
    """Whether each element is repeated along a dimension and the repetitions carry the units: fewer of them are made."""
    times = node.args[1] if calls(node, aten.repeat_interleave) and len(node.args) > 2 else 1
    if not isinstance(times, int) or times < 2 or int(node.args[2]) % rank(node) != dim:  # type: ignore[arg-type]
        return False
    blocks = labels.reshape(-1, times)
    return bool((blocks == blocks[:1]).all())


def _numbered(shape: torch.Size, axis: int) -> torch.Tensor:
    """The place along an axis of each element of a tensor."""
    sizes = [-1 if place == axis else 1 for place in range(len(shape))]
    return torch.arange(shape[axis]).reshape(sizes).expand(shape)


def _varies(values: torch.Tensor, axis: int) -> bool:
    """Whether values differ along an axis."""
    return values.shape[axis] > 1 and bool((values != values.narrow(axis, 0, 1)).any())


def _look_up(labels: Labels, indices: torch.Tensor) -> torch.Tensor:
    """The unit of each element, given its index in the labelled dimension."""
    return torch.where(indices != NONE, labels[indices.clamp(min=0)], NONE)


def _along(labels: torch.Tensor, axis: int) -> Labels | None:
    """The units along one axis; None if they depend on other axes too. Elements of no unit follow their index."""
    rows = labels.movedim(axis, 0).reshape(labels.shape[axis], -1)
    units = rows.amax(1)
    return units if bool(((rows == units[:, None]) | (rows == NONE)).all()) else None


def _source_labels(indices: torch.Tensor, labels: torch.Tensor, size: int) -> Labels | None:
    """The unit of each index, from the labels of the elements that come from it; None if two of them disagree."""
    units = torch.full((size,), NONE)
    units[indices] = labels
    return units if torch.equal(units[indices], labels) else None


def _side_inputs(program: Program, tables: bool) -> set[fx.Node]:
    """Nodes computed without any product, except those computed from weights alone; see `Coupling.is_side_input`.

    A product of positions and constants alone counts as none, such as that of the angles of rotary embeddings. What rows
    choose among weights, such as their delta, counts as weights: no other site reads it. With `tables`, nothing that reads a
    parameter is among them.
    """
    choices = {spec.name for spec in program.inputs if spec.kind is InputKind.CHOICE}
    weights: set[fx.Node] = set()
    side_inputs: set[fx.Node] = set()
    learned: set[fx.Node] = set()
    measured: set[fx.Node] = set()
    for node in program.graph.nodes:
        inputs = node.all_input_nodes
        is_choice = node.op == "placeholder" and node.target in choices
        if (node.op == "get_attr" and str(node.target) not in program.buffers) or not learned.isdisjoint(
            inputs
        ):
            learned.add(node)
        if (node.op == "placeholder" and _is_float(node)) or not measured.isdisjoint(inputs):
            measured.add(node)
        if node.op == "get_attr" or is_choice or (inputs and weights.issuperset(inputs)):
            weights.add(node)
        elif all(item in weights or item in side_inputs for item in inputs) and (
            traits_of(node).kind not in MIXING or not (node in learned or node in measured)
        ):
            side_inputs.add(node)
    return side_inputs - learned if tables else side_inputs


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def where(node: fx.Node) -> str:
    """An operator and its module, for a message."""
    scope = node.meta.get("scope")
    return f"operator {stem(node)}" + (f" in {scope}" if scope else "")


def _needs_all(node: fx.Node) -> str:
    return (
        "they are an output of the program"
        if node.op == "output"
        else f"{where(node)} needs all of them{unsaid_dims(node)}"
    )
