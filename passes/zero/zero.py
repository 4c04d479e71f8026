"""ZeRO: rewrite a step for sharded optimizer state, gradients and parameters (Rajbhandari et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from bmgraph.errors import InputError
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import FINAL, Effect, StepPass
from bmgraph.passes.zero.buckets import Bucket, make_buckets
from bmgraph.passes.zero.gather import gather
from bmgraph.passes.zero.reduce import reduce_gradients, sum_loss
from bmgraph.training.step_program import StepProgram

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
    all-gathered before its use and released when another layer is used, in forward and again in backward; gathering begins
    `prefetch` layers ahead, so that 1 + `prefetch` layers are whole at once at most. The last layers of forward, up to
    `keep` bytes of them, stay whole until backward has used them, which saves a third of their traffic. Frozen parameters
    (int8 codes, masks) are sharded and gathered as they are stored, and have no gradient; in the other stages they stay as
    they are. A bucket holds the parameters of one layer (or a single parameter) with one dtype, either all trained or all
    frozen. Batch-norm statistics stay local to each rank. A single rank works too.

    Raises InputError, on every rank, where programs or weights differ between ranks.
    Source: Rajbhandari et al. 2020 (arXiv:1910.02054).
    """

    effect: ClassVar[Effect] = "exact"
    provides: ClassVar[frozenset[str]] = frozenset({"sharded"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"sharded", "offloaded", FINAL})

    stage: int = 3
    prefetch: int = 1
    keep: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in STAGES:
            raise InputError(
                f"ZeRO({self.stage}): the stages are {', '.join(map(str, STAGES))}; ZeRO(3) needs the least memory on each rank"
            )

        if self.prefetch < 0:
            raise InputError(
                f"prefetch={self.prefetch}: give the number of buckets to gather ahead, 0 or more"
            )
        if self.keep < 0 or (self.keep and not STAGES[self.stage][0]):
            raise InputError(
                f"keep={self.keep} in stage {self.stage}: give the bytes of whole layers that ZeRO(3) keeps from forward to "
                "backward, 0 or more; in the other stages layers are always whole"
            )

    def run(self, step: StepProgram, context: Context) -> StepProgram:
        """Insert the collectives, and replace the tensors of the step by this rank's shards."""
        step.ranks.check_same("program", {"program": step.digest()})
        step.ranks.check_same(
            "set of tensors", {f"tensor {name!r}": item for name, item in step.digests.items()}
        )
        buckets = make_buckets(step, *STAGES[self.stage])
        reduce_gradients(step, buckets)
        with step.ranks.fail_together():  # a file may be damaged on one rank
            packed = _pack(step, buckets)
        gather(step, buckets, packed, self.prefetch, self.keep)
        sum_loss(step)
        step.shared = True
        for bucket in buckets:
            kind = "trained" if bucket.update else "frozen"
            held = f"{len(bucket.place.pieces)} {kind}, {bucket.place.nbytes} bytes on each rank"
            if bucket.update and not bucket.place.split:
                held += f", gradient {bucket.update.gradient}, optimizer state {bucket.update.state}"
            context.edited(bucket.name, held)
        step.graph.lint()
        return step


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
