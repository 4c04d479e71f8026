"""When gradients are summed over ranks: begun as soon as a bucket's are whole, awaited where the next bucket begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from bmgraph.ir.program import output_node
from bmgraph.passes.zero.buckets import Bucket
from bmgraph.training.graph_lowering import REDUCTIONS
from bmgraph.training.placement import Place, Update
from bmgraph.training.step_program import StepProgram

aten = torch.ops.aten
collective = torch.ops._c10d_functional


def reduce_gradients(step: StepProgram, buckets: Sequence[Bucket]) -> None:
    """Return the summed gradient of each bucket, or this rank's share of it."""
    gradients = step.gradients()
    order = {node: index for index, node in enumerate(step.graph.nodes)}
    rest = step.returned()[2 + len(step.trained) :]
    trained = {bucket.name: bucket.update for bucket in buckets if bucket.update is not None}
    parts = {name: [gradients[part] for part in update.gradient.names] for name, update in trained.items()}
    last = {name: max(found, key=order.__getitem__) for name, found in parts.items()}
    after = {name: node.next for name, node in last.items()}
    summed: dict[str, fx.Node] = {}
    sent: dict[str, fx.Node] = {}
    for name in sorted(trained, key=lambda item: order[last[item]]):
        for earlier, begun in sent.items():
            summed[earlier] = _wait(step, begun, before=after[name])
        sent = {name: _begin(step, trained[name].gradient, parts[name], before=after[name])}
    for name, begun in sent.items():
        summed[name] = _wait(step, begun, before=output_node(step.graph))
    output_node(step.graph).args = ((*step.returned()[:2], *(summed[name] for name in trained), *rest),)
    updates: dict[str, Update] = trained
    step.updates = updates


def _begin(step: StepProgram, place: Place, parts: Sequence[fx.Node], before: fx.Node) -> fx.Node:
    """Begin to sum the gradients of one bucket over ranks; of as much of it as a rank holds."""
    flat = [step.call(aten.reshape.default, part, [-1], before=before) for part in parts]
    if place.padding:
        flat.append(step.call(aten.new_zeros.default, parts[0], [place.padding], before=before))
    whole = step.call(aten.cat.default, flat, before=before)
    ranks = step.ranks
    if ranks.size == 1:
        return whole
    if place.split:
        scatters = collective.reduce_scatter_tensor.default
        return step.call(scatters, whole, "sum", ranks.size, ranks.group, before=before)
    return step.call(collective.all_reduce.default, whole, "sum", ranks.group, before=before)


def _wait(step: StepProgram, begun: fx.Node, before: fx.Node) -> fx.Node:
    if step.ranks.size == 1:
        return begun
    return step.call(collective.wait_tensor.default, begun, before=before)


def sum_loss(step: StepProgram) -> None:
    """Return the loss and the count summed over ranks; that begins when both are known, and ends before the first gradient
    is summed."""
    if step.ranks.size == 1:
        return
    order = {node: index for index, node in enumerate(step.graph.nodes)}
    known = max(step.returned()[:2], key=order.__getitem__).next
    while known.op == "placeholder":
        known = known.next
    terms = [
        step.call(aten._to_copy.default, term, dtype=torch.float64, before=known)
        for term in step.returned()[:2]
    ]
    both = step.call(aten.stack.default, terms, before=known)
    sent = step.call(collective.all_reduce.default, both, "sum", step.ranks.group, before=known)
    reductions = (node for node in step.graph.nodes if node.target in REDUCTIONS and node is not sent)
    first = next(reductions, output_node(step.graph))
    first = max(first, known, key=lambda node: order.get(node, len(order)))
    total = step.call(collective.wait_tensor.default, sent, before=first)
    summed = tuple(step.call(aten.select.int, total, 0, index, before=first) for index in (0, 1))
    output_node(step.graph).args = ((*summed, *step.returned()[2:]),)
