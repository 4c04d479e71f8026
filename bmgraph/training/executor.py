"""Running a step: its graph as code that lets go of every value after its last use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from bmgraph.training.step_program import StepProgram


@dataclass
class Stepped:
    """What one run gave: the summed loss, the count of items, and the gradient of the sum for each trained tensor."""

    loss: torch.Tensor
    count: torch.Tensor
    gradients: dict[str, torch.Tensor]


class Runner:
    """A step ready to run."""

    def __init__(self, step: StepProgram) -> None:
        self._step = step
        self._module = fx.GraphModule({}, step.graph)
        self._reads = tuple(step.reads())

    def run(self, batch: Mapping[str, torch.Tensor]) -> Stepped:
        """Forward and backward on this rank's rows; buffers get their new values."""
        step = self._step
        given = [batch[spec.name] for spec in step.outline.inputs]
        with torch.no_grad():
            loss, count, *rest = self._module(*given, *(step.tensors[name] for name in self._reads))
            for name, new in zip(step.writes, rest[len(step.trained) :]):
                step.tensors[name].copy_(new)
        return Stepped(loss, count, dict(zip(step.trained, rest)))
