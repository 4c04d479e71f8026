"""ZeRO: the ranks of a group share parameters, gradients and optimizer state (Rajbhandari et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.errors import InputError
from bmgraph.ir.program import output_node
from bmgraph.ir.tensor_spec import DTYPE_NAMES
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import FINAL, Effect, Pass, Stage
from bmgraph.passes.zero.parameter_groups import units
from bmgraph.training.shard_layout import Flat, Piece
from bmgraph.training.step_program import TENSOR, StepProgram

aten = torch.ops.aten
collective = torch.ops._c10d_functional

STAGES = (3,)
"""What is built of the paper's three: parameters too are shared."""


@dataclass(frozen=True, repr=False)
class ZeRO(Pass):
    """Each rank holds an even share of every layer's parameters, and of what the optimizer remembers of them.

    A layer is gathered before it is used and let go when another is, again in backward; the gradient of a layer is
    summed over ranks and cut as soon as it is whole. Frozen parameters (int8 codes, masks) are shared and gathered as
    they are stored, and never summed. A bucket holds the parameters of one layer, dtype and kind, or one parameter.
    Statistics of batch norm stay local to each rank. One rank works too.

    Raises InputError, on every rank, where ranks hold other programs or other weights.
    """

    acts_on: ClassVar[Stage] = "step"
    effect: ClassVar[Effect] = "exact"
    provides: ClassVar[frozenset[str]] = frozenset({"sharded"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"sharded", FINAL})

    stage: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in STAGES:
            raise InputError(f"ZeRO({self.stage}): only ZeRO(3) is built; it holds least on each rank")

    def run(self, program: StepProgram, context: Context) -> StepProgram:
        step = program
        step.ranks.check_same("program", {"program": step.digest()})
        step.ranks.check_same(
            "set of tensors", {f"tensor {name!r}": item for name, item in step.digests.items()}
        )
        buckets = _buckets(step)
        _reduce(step, buckets)
        _gather(step, buckets, _shard(step, buckets))
        _sum_loss(step)
        for bucket in buckets:
            kind = "trained" if bucket.trained else "frozen"
            share = bucket.layout.share * bucket.layout.dtype.itemsize
            context.edited(bucket.name, f"{len(bucket.layout.pieces)} {kind}, {share} bytes on each rank")
        step.graph.lint()
        return step


@dataclass(frozen=True)
class Bucket:
    """Parameters that are gathered and reduced at once."""

    name: str
    unit: str
    layout: Flat
    trained: bool


def _buckets(step: StepProgram) -> list[Bucket]:
    """The parameters by unit, dtype and whether they train, in the order of the program."""
    unit = units(step.outline)
    groups: dict[tuple[str, torch.dtype, bool], list[str]] = {}
    for name in step.outline.parameters:
        key = (unit[name], step.tensors[name].dtype, name in step.trained)
        groups.setdefault(key, []).append(name)
    return [
        Bucket(
            f"{path}/{DTYPE_NAMES[dtype]}/{'trained' if trained else 'frozen'}",
            path,
            Flat.of(((name, step.tensors[name]) for name in names), step.ranks.size),
            trained,
        )
        for (path, dtype, trained), names in groups.items()
    ]


def _shard(step: StepProgram, buckets: list[Bucket]) -> dict[str, fx.Node]:
    """Put this rank's share of each bucket in the place of its parameters; the placeholders of shares that are read."""
    reads = step.reads()
    made: dict[str, fx.Node] = {}
    for bucket in buckets:
        names = [piece.name for piece in bucket.layout.pieces]
        shard = bucket.layout.shard(step.ranks.rank, step.tensors.__getitem__, step.tensors[names[0]].device)
        for name in names:
            del step.tensors[name]
        step.layouts[bucket.name] = bucket.layout
        step.tensors[bucket.name] = shard
        if any(name in reads and reads[name].users for name in names):
            made[bucket.name] = step.placeholder(bucket.name, shard)
    return made


def _gather(step: StepProgram, buckets: list[Bucket], shards: dict[str, fx.Node]) -> None:
    """Let every reader of a parameter read a view of its gathered bucket instead.

    What is gathered serves readers until one needs another unit, so that one unit is whole at a time (and another where
    a single call needs both); the last of forward serves the first of backward.
    """
    home = {piece.name: (bucket, piece) for bucket in buckets for piece in bucket.layout.pieces}
    wholes: dict[str, fx.Node] = {}
    views: dict[str, fx.Node] = {}
    for node in list(step.graph.nodes):
        needed = [source for source in node.all_input_nodes if source.meta.get(TENSOR) in home]
        if not needed:
            continue
        current = {home[str(source.meta[TENSOR])][0].unit for source in needed}
        kept = {bucket.name for bucket in buckets if bucket.unit in current}
        wholes = {name: whole for name, whole in wholes.items() if name in kept}
        views = {name: view for name, view in views.items() if home[name][0].name in kept}
        for source in needed:
            name = str(source.meta[TENSOR])
            bucket, piece = home[name]
            if bucket.name not in wholes:
                wholes[bucket.name] = _whole(step, shards[bucket.name], before=node)
            if name not in views:
                views[name] = _view(step, wholes[bucket.name], piece, before=node)
            node.replace_input_with(source, views[name])
    for name, source in step.reads().items():
        if name in home:
            step.graph.erase_node(source)


def _whole(step: StepProgram, shard: fx.Node, before: fx.Node) -> fx.Node:
    if step.ranks.size == 1:
        return shard
    ranks = step.ranks
    sent = step.call(collective.all_gather_into_tensor.default, shard, ranks.size, ranks.group, before=before)
    return step.call(collective.wait_tensor.default, sent, before=before)


def _view(step: StepProgram, whole: fx.Node, piece: Piece, before: fx.Node) -> fx.Node:
    part = step.call(aten.slice.Tensor, whole, 0, piece.offset, piece.offset + piece.size, before=before)
    return step.call(aten.view.default, part, list(piece.shape), before=before)


def _reduce(step: StepProgram, buckets: list[Bucket]) -> None:
    """Return this rank's share of the summed gradient of each bucket, made as soon as its last part is there."""
    gradients = step.gradients()
    order = {node: place for place, node in enumerate(step.graph.nodes)}
    reduced: dict[str, fx.Node] = {}
    for bucket in buckets:
        if bucket.trained:
            parts = [gradients[piece.name] for piece in bucket.layout.pieces]
            after = max(parts, key=order.__getitem__).next
            reduced[bucket.name] = _share_of_sum(step, bucket.layout, parts, before=after)
    returned = step.returned()
    rest = returned[2 + len(step.trained) :]
    output_node(step.graph).args = ((*returned[:2], *reduced.values(), *rest),)
    step.trained = tuple(reduced)


def _share_of_sum(step: StepProgram, layout: Flat, parts: list[fx.Node], before: fx.Node) -> fx.Node:
    flat = [step.call(aten.reshape.default, part, [-1], before=before) for part in parts]
    if layout.padding:
        flat.append(step.call(aten.new_zeros.default, parts[0], [layout.padding], before=before))
    whole = step.call(aten.cat.default, flat, before=before)
    if step.ranks.size == 1:
        return whole
    ranks = step.ranks
    sent = step.call(
        collective.reduce_scatter_tensor.default, whole, "sum", ranks.size, ranks.group, before=before
    )
    return step.call(collective.wait_tensor.default, sent, before=before)


def _sum_loss(step: StepProgram) -> None:
    """Return the loss and the count of all ranks."""
    if step.ranks.size == 1:
        return
    output = output_node(step.graph)
    terms = [
        step.call(aten._to_copy.default, term, dtype=torch.float64, before=output)
        for term in step.returned()[:2]
    ]
    both = step.call(aten.stack.default, terms, before=output)
    sent = step.call(collective.all_reduce.default, both, "sum", step.ranks.group, before=output)
    total = step.call(collective.wait_tensor.default, sent, before=output)
    summed = tuple(step.call(aten.select.int, total, 0, index, before=output) for index in (0, 1))
    output.args = ((*summed, *step.returned()[2:]),)
