"""ZeRO-3: rewrite a step for sharded parameters, gradients and optimizer state (Rajbhandari et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.errors import InputError
from bmgraph.ir.program import output_node
from bmgraph.ir.tensor_spec import DTYPE_NAMES
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import FINAL, Effect, StepPass
from bmgraph.passes.zero.parameter_groups import units
from bmgraph.training.shard_layout import Flat, Piece
from bmgraph.training.step_program import TENSOR, StepProgram

aten = torch.ops.aten
collective = torch.ops._c10d_functional

STAGES = (3,)
"""The implemented stages of the three in the paper: stage 3 also shards parameters."""


@dataclass(frozen=True, repr=False)
class ZeRO(StepPass):
    """Shard the parameters of every layer, their gradients and their optimizer state evenly across ranks (stage 3).

    A layer is all-gathered before its use and released when another layer is gathered, in forward and again in backward.
    The gradient of a layer is reduce-scattered as soon as it is complete. Frozen parameters (int8 codes, masks) are
    sharded and gathered as they are stored, and have no gradient. A bucket holds the parameters of one layer (or a single
    parameter) with one dtype, either all trained or all frozen. Batch-norm statistics stay local to each rank. A single
    rank works too.

    Raises InputError, on every rank, where programs or weights differ between ranks.
    Source: Rajbhandari et al. 2020 (arXiv:1910.02054).
    """

    effect: ClassVar[Effect] = "exact"
    provides: ClassVar[frozenset[str]] = frozenset({"sharded"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"sharded", FINAL})

    stage: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in STAGES:
            raise InputError(
                f"ZeRO({self.stage}): only ZeRO(3) is implemented; it needs the least memory on each rank"
            )

    def run(self, step: StepProgram, context: Context) -> StepProgram:
        """Insert the collectives, and replace the tensors of the step by this rank's shards."""
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
            shard_bytes = bucket.layout.share * bucket.layout.dtype.itemsize
            context.edited(
                bucket.name, f"{len(bucket.layout.pieces)} {kind}, {shard_bytes} bytes on each rank"
            )
        step.graph.lint()
        return step


@dataclass(frozen=True)
class Bucket:
    """Parameters that are gathered and reduced in one collective, laid out in one flat tensor."""

    name: str
    unit: str
    layout: Flat
    trained: bool


def _buckets(step: StepProgram) -> list[Bucket]:
    """The parameters grouped by unit, dtype and whether they train, in the order of the program."""
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
    """Replace the parameters of each bucket by this rank's shard; returns the placeholders of the shards that are read."""
    reads = step.reads()
    shards: dict[str, fx.Node] = {}
    for bucket in buckets:
        names = [piece.name for piece in bucket.layout.pieces]
        shard = bucket.layout.shard(step.ranks.rank, step.tensors.__getitem__, step.tensors[names[0]].device)
        for name in names:
            del step.tensors[name]
        step.layouts[bucket.name] = bucket.layout
        step.tensors[bucket.name] = shard
        if any(name in reads and reads[name].users for name in names):
            shards[bucket.name] = step.placeholder(bucket.name, shard)
    return shards


def _gather(step: StepProgram, buckets: list[Bucket], shards: dict[str, fx.Node]) -> None:
    """Let every reader of a parameter read a view of its gathered bucket instead.

    A gathered unit is reused until a reader needs another unit, so only one unit is whole at a time (more where a single
    call needs several). The last unit of forward is reused by the first readers of backward.
    """
    location = {piece.name: (bucket, piece) for bucket in buckets for piece in bucket.layout.pieces}
    wholes: dict[str, fx.Node] = {}
    views: dict[str, fx.Node] = {}
    for node in list(step.graph.nodes):
        needed = [source for source in node.all_input_nodes if source.meta.get(TENSOR) in location]
        if not needed:
            continue
        current = {location[str(source.meta[TENSOR])][0].unit for source in needed}
        kept = {bucket.name for bucket in buckets if bucket.unit in current}
        wholes = {name: whole for name, whole in wholes.items() if name in kept}
        views = {name: view for name, view in views.items() if location[name][0].name in kept}
        for source in needed:
            name = str(source.meta[TENSOR])
            bucket, piece = location[name]
            if bucket.name not in wholes:
                wholes[bucket.name] = _all_gather(step, shards[bucket.name], before=node)
            if name not in views:
                views[name] = _view(step, wholes[bucket.name], piece, before=node)
            node.replace_input_with(source, views[name])
    for name, source in step.reads().items():
        if name in location:
            step.graph.erase_node(source)


def _all_gather(step: StepProgram, shard: fx.Node, before: fx.Node) -> fx.Node:
    """The whole flat tensor [ranks * share] of which `shard` [share] is this rank's part."""
    if step.ranks.size == 1:
        return shard
    ranks = step.ranks
    sent = step.call(collective.all_gather_into_tensor.default, shard, ranks.size, ranks.group, before=before)
    return step.call(collective.wait_tensor.default, sent, before=before)


def _view(step: StepProgram, whole: fx.Node, piece: Piece, before: fx.Node) -> fx.Node:
    """One parameter, in its shape, as a view of its whole flat tensor."""
    part = step.call(aten.slice.Tensor, whole, 0, piece.offset, piece.offset + piece.size, before=before)
    return step.call(aten.view.default, part, list(piece.shape), before=before)


def _reduce(step: StepProgram, buckets: list[Bucket]) -> None:
    """Return this rank's shard of the summed gradient of each bucket, reduced as soon as its last gradient is computed."""
    gradients = step.gradients()
    order = {node: index for index, node in enumerate(step.graph.nodes)}
    reduced: dict[str, fx.Node] = {}
    for bucket in buckets:
        if bucket.trained:
            parts = [gradients[piece.name] for piece in bucket.layout.pieces]
            after = max(parts, key=order.__getitem__).next
            reduced[bucket.name] = _reduce_scatter(step, bucket.layout, parts, before=after)
    returned = step.returned()
    rest = returned[2 + len(step.trained) :]
    output_node(step.graph).args = ((*returned[:2], *reduced.values(), *rest),)
    step.trained = tuple(reduced)


def _reduce_scatter(step: StepProgram, layout: Flat, parts: list[fx.Node], before: fx.Node) -> fx.Node:
    """This rank's shard [share] of the sum over ranks of the gradients of one bucket."""
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
    """Return the loss and the count summed over ranks."""
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
