"""Execute a step graph on one batch; the generated code frees every value after its last use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from bmgraph.distributed.link import collective_call
from bmgraph.errors import RankError
from bmgraph.ops.traits import traits_of
from bmgraph.training.step_program import TENSOR, StepProgram

aten = torch.ops.aten

COLLECTIVES = "_c10d_functional"
"""The namespace of the operators in which all ranks take part."""

Tensors = Mapping[str, torch.Tensor]
"""Tensors by name."""


@dataclass
class StepOutput:
    """The summed loss f[], the count of its items [], and the gradient of the sum for each trained tensor, by name.

    `buffers` are the new values of the buffers that the step changes, by name.
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

    def __init__(self, step: StepProgram) -> None:
        self._step = step
        self._collectives = _Collectives(step.device)
        self._module = fx.GraphModule({}, self._collectives.watched(step.graph))
        self._reads = tuple(step.reads())
        self._written = tuple(written_in_place(step))

    def run(self, batch: Tensors, instead: Tensors = MappingProxyType({})) -> StepOutput:
        """Forward and backward on this rank's rows; `keep` the new values of buffers afterwards.

        `instead`: what the graph reads in place of tensors of the step, or beside them, by name.
        """
        (loss, count, *gradients), buffers = self.call(batch, instead)
        return StepOutput(loss, count, dict(zip(self._step.trained, gradients)), buffers)

    def call(
        self, batch: Tensors, instead: Tensors
    ) -> tuple[Sequence[torch.Tensor], dict[str, torch.Tensor]]:
        """What the graph returns on this rank's rows, and the new values of buffers by name."""
        step = self._step
        inputs = [batch[spec.name] for spec in step.outline.inputs]
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


class _Collectives:
    """The collectives of a graph in their order, and how many of them this run has taken part in."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._nodes: list[fx.Node] = []
        self._begun = 0
        self._waiting: list[torch.Tensor] = []

    def watched(self, graph: fx.Graph) -> fx.Graph:
        """A copy of a graph whose collectives are counted as they run."""
        copy = fx.Graph()
        copy.output(copy.graph_copy(graph, {}))
        for node in copy.nodes:
            if getattr(node.target, "namespace", None) == COLLECTIVES:
                if node.target is torch.ops._c10d_functional.wait_tensor.default:
                    node.target = self._wait(node.target)
                else:
                    self._nodes.append(node)
                    node.meta["collective"] = node.target
                    node.target = self._begin(node.target)
        return copy

    def __enter__(self) -> None:
        self._begun = 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Begin and end what is left, which is nothing after a whole run; where a rank has left, nothing is to be had."""
        waiting, self._waiting = self._waiting, []
        if kind is not None and issubclass(kind, RankError):
            return
        for tensor in waiting:
            with collective_call():
                torch.ops._c10d_functional.wait_tensor(tensor)
        for node in self._nodes[self._begun :]:
            source: Any = node.args[0]
            like = source.meta["val"]
            zeros = torch.zeros([int(size) for size in like.shape], dtype=like.dtype, device=self._device)
            operator: Any = node.meta["collective"]
            with collective_call():
                torch.ops._c10d_functional.wait_tensor(operator(zeros, *node.args[1:]))
        self._begun = len(self._nodes)

    def _begin(self, operator: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def begin(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
            self._begun += 1
            with collective_call():
                sent = operator(tensor, *args)
            self._waiting.append(sent)
            return sent

        return begin

    def _wait(self, operator: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wait(tensor: torch.Tensor) -> torch.Tensor:
            self._waiting = [other for other in self._waiting if other is not tensor]
            with collective_call():
                return operator(tensor)

        return wait
