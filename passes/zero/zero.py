"""ZeRO: rewrite a step for sharded optimizer state, gradients and parameters (Rajbhandari et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from bmgraph.errors import InputError
from bmgraph.ir.program import output_node
from bmgraph.ir.tensor_spec import DTYPE_NAMES
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import FINAL, Effect, StepPass
from bmgraph.passes.zero.parameter_groups import units
from bmgraph.training.placement import Piece, Place, Update
from bmgraph.training.step_program import TENSOR, StepProgram

aten = torch.ops.aten
collective = torch.ops._c10d_functional

STAGES: dict[int, tuple[bool, bool, bool]] = {
    0: (False, False, False),
    1: (False, False, True),
    2: (False, True, True),
    3: (True, True, True),
}
"""The stages of the paper, and 0 for plain data parallelism: whether values, gradients and optimizer state are split."""


@dataclass(frozen=True, repr=False)
class ZeRO(StepPass):
    """Share a step over ranks: split the optimizer state (stage 1), also gradients (2), also parameters (3), or none (0).

    The gradients of a layer are reduced as soon as they are complete: reduce-scattered where they are split, else
    all-reduced. Each rank updates its share; where parameters are whole, the new values are gathered. In stage 3 a layer is
    all-gathered before its use and released when another layer is gathered, in forward and again in backward; frozen
    parameters (int8 codes, masks) are sharded and gathered as they are stored, and have no gradient. In the other stages
    frozen parameters stay as they are. A bucket holds the parameters of one layer (or a single parameter) with one dtype,
    either all trained or all frozen. Batch-norm statistics stay local to each rank. A single rank works too.

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
                f"ZeRO({self.stage}): the stages are {', '.join(map(str, STAGES))}; ZeRO(3) needs the least memory on each rank"
            )

    def run(self, step: StepProgram, context: Context) -> StepProgram:
        """Insert the collectives, and replace the tensors of the step by this rank's shards."""
        step.ranks.check_same("program", {"program": step.digest()})
        step.ranks.check_same(
            "set of tensors", {f"tensor {name!r}": item for name, item in step.digests.items()}
        )
        buckets = _buckets(step, self.stage)
        _reduce(step, buckets)
        _gather(step, buckets, _pack(step, buckets))
        _sum_loss(step)
        step.shared = True
        for bucket in buckets:
            kind = "trained" if bucket.update else "frozen"
            held = f"{len(bucket.place.pieces)} {kind}, {bucket.place.nbytes} bytes on each rank"
            if bucket.update and not bucket.place.split:
                held += f", gradient {bucket.update.gradient}, optimizer state {bucket.update.state}"
            context.edited(bucket.name, held)
        step.graph.lint()
        return step


Kept = tuple[torch.dtype, torch.dtype, torch.device]
"""The dtype of a gradient, and the dtype and device of an optimizer state."""


@dataclass(frozen=True)
class Bucket:
    """Parameters that are gathered and reduced in one collective, laid out in one flat tensor."""

    name: str
    unit: str
    place: Place
    update: Update | None
    """If it is trained."""


def _buckets(step: StepProgram, stage: int) -> list[Bucket]:
    """The parameters grouped by unit, dtype and whether they train, in the order of the program; only those that train
    if values are not split."""
    values, gradients, states = STAGES[stage]
    unit = units(step.outline)
    groups: dict[tuple[str, torch.dtype, Kept | None], list[str]] = {}
    for name in step.outline.parameters:
        kept = _kept(step.updates[name]) if name in step.updates else None
        if kept or values:
            groups.setdefault((unit[name], step.tensors[name].dtype, kept), []).append(name)
    buckets = []
    for (path, dtype, kept), names in groups.items():
        place = Place.pack(((name, step.tensors[name]) for name in names), step.ranks.size, values)
        if kept is None:
            buckets.append(Bucket(f"{path}/{DTYPE_NAMES[dtype]}/frozen", path, place, None))
            continue
        gradient, state, device = kept
        more = "" if state == dtype else f"/{DTYPE_NAMES[state]}"
        update = Update(
            replace(place, split=gradients, dtype=gradient),
            replace(place, split=states, dtype=state, device=device),
        )
        buckets.append(Bucket(f"{path}/{DTYPE_NAMES[dtype]}{more}/trained", path, place, update))
    return buckets


def _kept(update: Update) -> Kept:
    return update.gradient.dtype, update.state.dtype, update.state.device


def _pack(step: StepProgram, buckets: list[Bucket]) -> dict[str, fx.Node]:
    """Replace the parameters of each bucket by what this rank holds of it; returns the placeholders of those that are
    read."""
    reads = step.reads()
    packed: dict[str, fx.Node] = {}
    for bucket in buckets:
        names = bucket.place.names
        held = bucket.place.take(step.ranks.rank, step.tensors.__getitem__)
        if bucket.update is not None and any(name in step.masters for name in names):
            masters = {name: step.masters.pop(name, step.tensors[name]) for name in names}
            step.masters[bucket.name] = bucket.update.state.take(step.ranks.rank, masters.__getitem__)
        for name in names:
            del step.tensors[name], step.places[name]
        step.tensors[bucket.name], step.places[bucket.name] = held, bucket.place
        if any(name in reads and reads[name].users for name in names):
            packed[bucket.name] = step.placeholder(bucket.name)
    return packed


def _gather(step: StepProgram, buckets: list[Bucket], packed: dict[str, fx.Node]) -> None:
    """Let every reader of a parameter read a view of its whole bucket instead, which is gathered if it is split.

    A gathered unit is reused until a reader needs another unit, so only one unit is whole at a time (more where a single
    call needs several). The last unit of forward is reused by the first readers of backward.
    """
    location = {piece.name: (bucket, piece) for bucket in buckets for piece in bucket.place.pieces}
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
                held = packed[bucket.name]
                wholes[bucket.name] = _all_gather(step, held, before=node) if bucket.place.split else held
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
    """Return the summed gradient of each bucket, or this rank's share of it, reduced as soon as its last gradient is
    computed."""
    gradients = step.gradients()
    order = {node: index for index, node in enumerate(step.graph.nodes)}
    rest = step.returned()[2 + len(step.trained) :]
    reduced: list[fx.Node] = []
    updates: dict[str, Update] = {}
    for bucket in buckets:
        if bucket.update is not None:
            parts = [gradients[name] for name in bucket.place.names]
            after = max(parts, key=order.__getitem__).next
            reduced.append(_summed(step, bucket.update.gradient, parts, before=after))
            updates[bucket.name] = bucket.update
    output_node(step.graph).args = ((*step.returned()[:2], *reduced, *rest),)
    step.updates = updates


def _summed(step: StepProgram, place: Place, parts: list[fx.Node], before: fx.Node) -> fx.Node:
    """The sum over ranks of the gradients of one bucket, as much of it as a rank holds."""
    flat = [step.call(aten.reshape.default, part, [-1], before=before) for part in parts]
    if place.padding:
        flat.append(step.call(aten.new_zeros.default, parts[0], [place.padding], before=before))
    whole = step.call(aten.cat.default, flat, before=before)
    ranks = step.ranks
    if ranks.size == 1:
        return whole
    if place.split:
        sent = step.call(
            collective.reduce_scatter_tensor.default, whole, "sum", ranks.size, ranks.group, before=before
        )
    else:
        sent = step.call(collective.all_reduce.default, whole, "sum", ranks.group, before=before)
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
