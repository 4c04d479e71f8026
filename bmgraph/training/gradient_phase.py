"""The gradient phase of a step: the graph on every micro-batch of this rank, and the sums over micro-batches and ranks.

It changes nothing: neither the step's tensors nor, before `keep`, its buffers. So what fails leaves all as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from bmgraph.training.executor import Runner, StepOutput
from bmgraph.training.step_program import StepProgram

Rows = Mapping[str, torch.Tensor]
"""Some rows of a batch: inputs by name."""


class GradientPhase:
    """Runs the graph of a step on micro-batches. Collective: all ranks run as many."""

    def __init__(self, step: StepProgram) -> None:
        self._step = step
        self._runner = Runner(step)

    def micro_batches(self, rows: Rows) -> list[Rows]:
        """This rank's rows of a batch, in the parts that the graph is run on."""
        return [rows]

    def run(self, parts: Sequence[Rows]) -> StepOutput:
        """The loss, count and gradients, summed over micro-batches and ranks, and the new values of buffers."""
        (rows,) = parts
        return self._runner.run({name: value.to(self._step.device) for name, value in rows.items()})

    def keep(self, output: StepOutput) -> None:
        """Write the new values of buffers in place."""
        self._runner.keep(output)
