"""ParallelHead: the language head and its cross-entropy, split over ranks by rows of the vocabulary (Shoeybi et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers our operators)
from bmgraph.errors import PassError
from bmgraph.ir.program import output_node
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import FINAL, Effect, StepPass
from bmgraph.passes.vocabulary_sites import Head, erase_dead, find_head, find_readers
from bmgraph.training.graph_lowering import drop_idle_calls
from bmgraph.training.placement import Place, Update
from bmgraph.training.step_program import StepProgram

aten = torch.ops.aten
ours = torch.ops.bmgraph


@dataclass(frozen=True, repr=False)
class ParallelHead(StepPass):
    """Let each rank compute the logits, loss and gradient of its own rows of the vocabulary, after `ZeRO(stage=3)`.

    Hidden states are gathered instead of the table, which stays where it is split: logits f[N, V / ranks] of the N tokens of all
    ranks, of which log-sum-exps are combined with sums in float64. A table that is also the embedding exchanges only the rows
    that are looked up. The loss is that of the whole vocabulary, within 3e-6; dropout, labels that are ignored, ranks with
    unequal numbers of tokens and vocabularies that the ranks do not divide are allowed. A single rank works too.

    Raises PassError, on every rank, where it does not apply: no `ZeRO(3)`, no cross-entropy over one linear without a bias,
    logits or a table that something else reads, class weights or label smoothing, a frozen head, half precision.
    Source: Shoeybi et al. 2019 (arXiv:1909.08053), section 3.

    Example:
        >>> from bmgraph.passes import ParallelHead, ZeRO
        >>> passes = [ZeRO(stage=3), ParallelHead()]
    """

    effect: ClassVar[Effect] = "exact"
    requires: ClassVar[frozenset[str]] = frozenset({"sharded"})
    provides: ClassVar[frozenset[str]] = frozenset({"parallel head"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"parallel head", FINAL})

    def run(self, step: StepProgram, context: Context) -> StepProgram:
        """Replace the head by operators that are collective, and align the table's shards to its rows."""
        drop_idle_calls(step.graph)
        head = find_head(step)
        place = step.places[head.bucket]
        if not place.split:
            raise PassError(
                f"the table {place.names[0]!r} is whole on every rank: ParallelHead needs it split, by ZeRO(stage=3) before"
            )
        readers = find_readers(step, head)
        _align(step, head.bucket, place.pieces[0].shape[1])
        share = step.reads()[head.bucket]
        classes, width = place.pieces[0].shape
        ranks = (step.ranks.size, step.ranks.group)
        for lookup in readers.lookups:
            arguments = (share, lookup.args[1], width, classes, *ranks)
            rows = step.call(ours.parallel_embedding.default, *arguments, before=lookup, like=lookup)
            lookup.replace_all_uses_with(rows)
        gradient = _cross_entropy(step, head, share, classes)
        for looked_up in readers.gradients:
            rows_of_rank = step.places[head.bucket].share // width
            padding: Any = looked_up.args[3]
            added = step.call(
                ours.parallel_embedding_rows.default, *looked_up.args[:2], rows_of_rank, padding, *ranks,
                before=looked_up, like=looked_up,
            )  # fmt: skip
            index, values = (_item(step, added, number, looked_up) for number in (0, 1))
            gradient = step.call(aten.index_add.default, gradient, 0, index, values, before=looked_up)
        flat = step.call(aten.reshape.default, gradient, [-1], before=readers.summed)
        old = step.gradients()[head.bucket]
        output = output_node(step.graph)
        output.args = (tuple(flat if node is old else node for node in step.returned()),)
        erase_dead(step.graph, [old, *readers.lookups, head.d_logits, head.forward])
        if head.logits in set(step.graph.nodes):
            reader = next(iter(head.logits.users))
            raise PassError(
                f"the logits at {head.logits.meta.get('scope')!r} are read by {reader.target} besides the loss"
            )
        context.edited(
            place.names[0], f"{step.places[head.bucket].share // width} of {classes} rows on each rank"
        )
        step.graph.lint()
        return step


def _cross_entropy(step: StepProgram, head: Head, share: fx.Node, classes: int) -> fx.Node:
    """Insert the loss with its gradients; returns the gradient of this rank's rows."""
    made = step.call(
        ours.parallel_cross_entropy.default, head.hidden, share, head.target, classes, head.ignored, step.ranks.size,
        step.ranks.group, before=head.forward, like=head.forward,
    )  # fmt: skip
    total, d_hidden, d_table = (_item(step, made, number, head.forward) for number in (0, 1, 2))
    head.total.replace_all_uses_with(total)
    if head.factor is not None:
        d_hidden, d_table = (
            step.call(aten.mul.Tensor, item, head.factor, before=head.d_logits)
            for item in (d_hidden, d_table)
        )
    head.d_hidden.replace_all_uses_with(d_hidden)
    return d_table


def _item(step: StepProgram, made: fx.Node, number: int, before: fx.Node) -> fx.Node:
    import operator

    return step.call(operator.getitem, made, number, before=before)


def _align(step: StepProgram, bucket: str, width: int) -> None:
    """Cut a bucket between its rows: each rank holds whole rows of the table."""
    old, update = step.places[bucket], step.updates[bucket]

    def aligned(place: Place) -> Place:
        return replace(place, align=width)

    (name,) = old.names
    new = aligned(old)
    if new.share != old.share:
        whole = old.join(step.tensors[bucket], step.ranks)[name]
        step.tensors[bucket] = new.take(step.ranks.rank, lambda _: whole)
        if bucket in step.masters:
            master = update.state.join(step.masters[bucket], step.ranks)[name]
            step.masters[bucket] = aligned(update.state).take(step.ranks.rank, lambda _: master)
        node = step.reads()[bucket]
        node.meta["val"] = node.meta["val"].new_empty(new.shape)
    step.places[bucket] = new
    step.updates[bucket] = Update(aligned(update.gradient), aligned(update.state))
