"""Execute a step graph on one batch; the generated code frees every value after its last use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from bmgraph.ops.traits import traits_of
from bmgraph.training.collectives import Buffers, Collectives
from bmgraph.training.compiled_regions import CompiledRegions
from bmgraph.training.gradient_calls import Taken, take_gradients
from bmgraph.training.graph_lowering import accumulate_in_place, drop_idle_calls, write_into_buckets
from bmgraph.training.step_program import TENSOR, StepProgram
from bmgraph.utils.graph_copies import copy_nodes

Tensors = Mapping[str, torch.Tensor]
"""Tensors by name."""


@dataclass
class StepOutput:
    """The summed loss f[], the count of its items [], and the gradient of the sum for each trained tensor, by name.

    `buffers` are the new values of the buffers that the step changes, by name. Gradients that were taken within the graph
    are left out.
    """

    loss: torch.Tensor
    count: torch.Tensor
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


class Runner:
    """Runs a step: compiles its graph once, and reads its tensors at every run.

    All ranks run a step together. Where one fails in the middle, it still takes part in the rest of the collectives, with
    zeros: the other ranks would wait for it. They then agree on the error (`Ranks.fail_together`).
    """

    def __init__(
        self,
        step: StepProgram,
        buffers: Buffers | None = None,
        taken: Taken | None = None,
        regions: CompiledRegions | None = None,
    ) -> None:
        """Compile a step's graph; `buffers` are those of another runner of the same step, to share. `taken`: what gradients
        are given to as soon as they are whole, instead of being returned. `regions`: where kernels of the graph are."""
        self._step = step
        self.buffers = buffers or Buffers()
        self._collectives = Collectives(step.device, self.buffers)
        lowered = lowered_graph(step.graph, self.buffers)
        if taken is not None:
            take_gradients(lowered, step.trained, taken)
        self._collectives.bind(lowered)
        self._regions = regions
        if regions is not None:
            regions.replace(lowered)
        self._module = fx.GraphModule({}, lowered)
        self._reads = tuple(step.reads())
        self._written = tuple(written_in_place(step))
        self._symbols = _symbols_of_inputs(step)

    def run(self, batch: Tensors, instead: Tensors = MappingProxyType({})) -> StepOutput:
        """Forward and backward on this rank's rows; `keep` the new values of buffers afterwards.

        `instead`: what the graph reads in place of tensors of the step, or beside them, by name.
        """
        (loss, count, *gradients), buffers = self.call(batch, instead)
        kept = {name: item for name, item in zip(self._step.trained, gradients) if item is not None}
        return StepOutput(loss, count, kept, buffers)

    def call(
        self, batch: Tensors, instead: Tensors
    ) -> tuple[Sequence[torch.Tensor], dict[str, torch.Tensor]]:
        """What the graph returns on this rank's rows, and the new values of buffers by name."""
        step = self._step
        inputs = [batch[spec.name] for spec in step.outline.inputs]
        self._collectives.sizes = {
            symbol: inputs[place].shape[axis] for symbol, (place, axis) in self._symbols.items()
        }
        if self._regions is not None:
            self._regions.sizes = tuple(value.shape for value in inputs)
        held = {name: instead[name] if name in instead else step.tensors[name] for name in self._reads}
        buffers = {name: held[name].clone() for name in self._written}
        with torch.no_grad(), self._collectives:
            found = self._module(*inputs, *(held | buffers).values())
        own = len(found) - len(step.writes)
        return found[:own], buffers | dict(zip(step.writes, found[own:]))

    def take_part(self) -> None:
        """Take part in the collectives of a run, with zeros, without running."""
        with self._collectives:
            pass

    def keep(self, output: StepOutput) -> None:
        """Write the new values of buffers in place."""
        for name, new in output.buffers.items():
            self._step.tensors[name].copy_(new)


def _symbols_of_inputs(step: StepProgram) -> dict[Any, tuple[int, int]]:
    """Where the sizes of inputs stand that are symbols: (place of the input, axis)."""
    inputs = [node for node in step.graph.nodes if node.op == "placeholder" and TENSOR not in node.meta]
    return {
        size.node.expr: (place, axis)
        for place, node in enumerate(inputs)
        for axis, size in enumerate(node.meta["val"].shape)
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol
    }


def lowered_graph(graph: fx.Graph, buffers: Buffers) -> fx.Graph:
    """A copy of a graph in the form that runs, with buckets of gradients from `buffers`; collectives are still functional."""
    copy = fx.Graph()
    copy.output(copy_nodes(copy, graph, {}))
    drop_idle_calls(copy)
    accumulate_in_place(copy)
    write_into_buckets(copy, buffers.flat.take)
    return copy


def written_in_place(step: StepProgram) -> list[str]:
    """The buffers that operators of the graph write to (running statistics)."""
    written: dict[str, None] = {}
    for node in step.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        arguments, unsaid = node.target._schema.arguments, traits_of(node).writes
        for place, value in enumerate(node.args):
            if place >= len(arguments):
                break
            alias = arguments[place].alias_info
            writes = arguments[place].name in unsaid or (alias is not None and alias.is_write)
            if writes and isinstance(value, fx.Node) and value.meta.get(TENSOR) in step.outline.buffers:
                written[str(value.meta[TENSOR])] = None
    return list(written)
