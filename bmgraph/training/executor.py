"""Execute a step graph on one batch; the generated code frees every value after its last use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from bmgraph.training.step_program import StepProgram


@dataclass
class StepOutput:
    """The summed loss f[], the count of its items [], and the gradient of the sum for each trained tensor, by name."""

    loss: torch.Tensor
    count: torch.Tensor
    gradients: dict[str, torch.Tensor]


class Runner:
    """Runs a step: compiles its graph once, and reads its tensors at every run."""

    def __init__(self, step: StepProgram) -> None:
        self._step = step
        self._module = fx.GraphModule({}, step.graph)
        self._reads = tuple(step.reads())

    def run(self, batch: Mapping[str, torch.Tensor]) -> StepOutput:
        """Forward and backward on this rank's rows; writes the new values of buffers in place."""
        step = self._step
        inputs = [batch[spec.name] for spec in step.outline.inputs]
        with torch.no_grad():
            loss, count, *others = self._module(*inputs, *(step.tensors[name] for name in self._reads))
            for name, new in zip(step.writes, others[len(step.trained) :]):
                step.tensors[name].copy_(new)
        return StepOutput(loss, count, dict(zip(step.trained, others)))
