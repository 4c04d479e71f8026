"""When split parameters are whole: gathered ahead of their first reader, let go after their last, in forward and in backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from bmgraph.passes.zero.buckets import Bucket
from bmgraph.training.placement import Piece
from bmgraph.training.step_program import TENSOR, StepProgram

aten = torch.ops.aten
collective = torch.ops._c10d_functional

Location = Mapping[str, tuple[Bucket, Piece]]
"""By parameter: its bucket, and its position there."""


@dataclass
class Visit:
    """A stretch of the graph in which the buckets of a unit are whole."""

    unit: str
    begin: fx.Node
    """Its first reader."""
    buckets: dict[str, fx.Node] = field(default_factory=dict)
    """The buckets that are read, with the first reader of each."""


def gather(
    step: StepProgram, buckets: Sequence[Bucket], packed: Mapping[str, fx.Node], prefetch: int, keep: int = 0
) -> None:
    """Let every reader of a parameter read a view of its whole bucket instead, which is gathered if it is split.

    A gathered unit is reused until a reader needs another unit, so only one unit is whole at a time (more where a single
    call needs several), beside the next `prefetch` ones, whose gathering has begun. The last unit of forward is reused by
    the first readers of backward. Units of up to `keep` bytes in all stay whole until their last reader in backward.
    `packed`: the placeholders of the buckets by name.
    """
    location: Location = {piece.name: (bucket, piece) for bucket in buckets for piece in bucket.place.pieces}
    visits, visit_of = _visits(step, location, frozenset())
    kept = _kept(visits, buckets, keep)
    if kept:
        visits, visit_of = _visits(step, location, kept)
    schedule = _Schedule(step, {bucket.name: bucket for bucket in buckets}, packed)
    for index, visit in enumerate(visits):
        schedule.begin(visit, before=visit.begin)
        schedule.wait(visit, visit.begin)
        for following in visits[index + 1 : index + 1 + prefetch]:
            schedule.begin(following, before=visit.begin)
    for visit in visits:
        for reader in dict.fromkeys(visit.buckets.values()):
            schedule.wait(visit, reader)
    views: dict[tuple[int, str], fx.Node] = {}
    for (node, source), visit in visit_of.items():
        name = str(source.meta[TENSOR])
        key = id(visit), name
        if key not in views:
            bucket, piece = location[name]
            views[key] = view_of(step, schedule.whole[id(visit), bucket.name], piece, before=node)
        node.replace_input_with(source, views[key])
    for name, source in step.reads().items():
        if name in location:
            step.graph.erase_node(source)


def _kept(visits: Sequence[Visit], buckets: Sequence[Bucket], keep: int) -> frozenset[str]:
    """The units that stay whole: of those that are gathered again, the last ones of forward, which wait least."""
    first: dict[str, int] = {}
    again: set[str] = set()
    for index, visit in enumerate(visits):
        if first.setdefault(visit.unit, index) != index:
            again.add(visit.unit)
    sizes = dict.fromkeys(first, 0)
    for bucket in buckets:
        if bucket.unit in sizes:
            sizes[bucket.unit] += bucket.place.ranks * bucket.place.share * bucket.place.dtype.itemsize
    chosen: set[str] = set()
    for unit in sorted(again, key=first.__getitem__, reverse=True):
        if sizes[unit] <= keep:
            keep -= sizes[unit]
            chosen.add(unit)
    return frozenset(chosen)


def _visits(
    step: StepProgram, location: Location, kept: frozenset[str]
) -> tuple[list[Visit], dict[tuple[fx.Node, fx.Node], Visit]]:
    """The visits in the order of their first readers, and the visit of each (reader, placeholder of a parameter); units in
    `kept` have one visit."""
    visits: list[Visit] = []
    visit_of: dict[tuple[fx.Node, fx.Node], Visit] = {}
    current: dict[str, Visit] = {}
    for node in step.graph.nodes:
        needed = [source for source in node.all_input_nodes if source.meta.get(TENSOR) in location]
        if not needed:
            continue
        read = {location[str(source.meta[TENSOR])][0].unit for source in needed}
        current = {unit: visit for unit, visit in current.items() if unit in read or unit in kept}
        for source in needed:
            bucket, _ = location[str(source.meta[TENSOR])]
            if bucket.unit not in current:
                current[bucket.unit] = Visit(bucket.unit, node)
                visits.append(current[bucket.unit])
            visit = current[bucket.unit]
            visit.buckets.setdefault(bucket.name, node)
            visit_of[node, source] = visit
    return visits, visit_of


class _Schedule:
    """Inserts the collectives of visits: each begins and is awaited once."""

    def __init__(
        self, step: StepProgram, buckets: Mapping[str, Bucket], packed: Mapping[str, fx.Node]
    ) -> None:
        self._step = step
        self._buckets = buckets
        self._packed = packed
        self._sent: dict[tuple[int, str], fx.Node] = {}
        self.whole: dict[tuple[int, str], fx.Node] = {}
        """The whole bucket by visit and name."""

    def begin(self, visit: Visit, before: fx.Node) -> None:
        """Begin to gather all buckets of a visit, unless that was done."""
        ranks = self._step.ranks
        for name in visit.buckets:
            key = id(visit), name
            if key in self._sent:
                continue
            held = self._packed[name]
            if ranks.size > 1 and self._buckets[name].place.split:
                gathers = collective.all_gather_into_tensor.default
                held = self._step.call(gathers, held, ranks.size, ranks.group, before=before)
            self._sent[key] = held

    def wait(self, visit: Visit, reader: fx.Node) -> None:
        """Wait for the buckets of a visit whose first reader is this one, unless that was done."""
        for name, first in visit.buckets.items():
            key = id(visit), name
            if first is not reader or key in self.whole:
                continue
            sent = self._sent[key]
            is_sent = sent is not self._packed[name]
            self.whole[key] = (
                self._step.call(collective.wait_tensor.default, sent, before=reader) if is_sent else sent
            )


def view_of(step: StepProgram, whole: fx.Node, piece: Piece, before: fx.Node) -> fx.Node:
    """One parameter, in its shape, as a view of its whole flat tensor."""
    part = step.call(aten.slice.Tensor, whole, 0, piece.offset, piece.offset + piece.size, before=before)
    return step.call(aten.view.default, part, list(piece.shape), before=before)
