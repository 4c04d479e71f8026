"""How steps are run to be compared: without dropout, on the beginning of a batch, where their time is that of the parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from bmgraph.ir.program import copy_graph
from bmgraph.ir.symbolic_dim import is_name
from bmgraph.training.step_program import StepProgram
from bmgraph.utils.stored_tensor import is_too_large

aten = torch.ops.aten

Batch = Mapping[str, torch.Tensor]


def shortened(step: StepProgram, batch: Batch, longest: int) -> Batch:
    """The beginning of a batch along its free axes, at most `longest` each, or as many as there are ranks; the batch itself
    where sizes depend on each other.

    The loss may then have no item, or labels that point behind the end: whoever compares falls back on the whole batch.
    """
    inputs, ranges = step.outline.inputs, step.outline.ranges
    free = {dim for spec in inputs for dim in spec.shape if isinstance(dim, str)}
    if not all(map(is_name, free)):
        return batch
    short = dict(batch)
    for spec in inputs:
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                least = ranges[dim].low if dim in ranges else 0
                kept = min(batch[spec.name].shape[axis], max(longest, least, step.ranks.size))
                short[spec.name] = short[spec.name].narrow(axis, 0, kept)
    changed = any(short[name].shape != value.shape for name, value in batch.items())
    return short if changed else batch


def why_not_run(step: StepProgram, batch: Batch, limit: int) -> str:
    """Why a step is not run to be compared, where whole parameters with their gradients take `limit` bytes at most; empty if it is."""
    if not batch:
        return "the program has no example"
    if step.device.type == "meta":
        return "the step is on the meta device"
    if any(map(is_too_large, step.tensors.values())):
        return "its weights are in files, and read shard by shard"
    size = 2 * sum(tensor.numel() * tensor.element_size() for tensor in step.tensors.values())
    return f"it would hold {size / 2**30:.1f} GiB on each rank" if size > limit else ""


def is_dropout(node: fx.Node) -> bool:
    """Whether a node of a step is the forward of a dropout."""
    return node.target is aten.native_dropout.default


def without_dropout(step: StepProgram) -> fx.Graph:
    """A copy of a step's graph that drops nothing, and so does not scale up what is kept, forward and backward."""
    graph = copy_graph(step.graph)
    for node in graph.nodes:
        if is_dropout(node):
            node.update_arg(1, 0.0)
        elif node.target is aten.native_dropout_backward.default:
            node.update_arg(2, 1.0)
    return graph


def wrong_dropout(step: StepProgram) -> str:
    """The name of a backward of a dropout that does not scale as its forward does; empty if all do."""
    for node in step.graph.nodes:
        if node.target is aten.native_dropout_backward.default:
            _, mask, scale = node.args
            forward = mask.args[0] if isinstance(mask, fx.Node) else None
            if not isinstance(forward, fx.Node) or not is_dropout(forward):
                return str(node.name)
            kept = 1.0 - float(forward.args[1])  # type: ignore[arg-type]
            if abs(float(scale) * kept - (1.0 if kept else 0.0)) > 1e-6:  # type: ignore[arg-type]
                return str(node.name)
    return ""
