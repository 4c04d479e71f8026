"""The gradient phase of a step: the graph on every micro-batch of this rank, and the sums over micro-batches and ranks.

It changes nothing: neither the step's tensors nor, before `keep`, its buffers. So what fails leaves all as it was. But where
gradients are taken as soon as they are whole (`taken`), what takes them may change the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch

from bmgraph.training.accumulation import MicroSteps, micro_steps
from bmgraph.training.compiled_regions import CompiledRegions
from bmgraph.training.executor import Runner, StepOutput
from bmgraph.training.gradient_calls import Taken
from bmgraph.training.step_program import WHOLE, StepProgram

Rows = Mapping[str, torch.Tensor]
"""Some rows of a batch: inputs by name."""


def share_items(step: StepProgram, parts: Sequence[Rows]) -> None:
    """Count the items of each term of the loss over all ranks and micro-batches, and let the graph read their shares.

    Collective if there are several terms. Raises InputError on all ranks if a term has no item.
    """
    if step.counts is None:
        return
    with step.ranks.fail_together():
        counts = torch.stack([step.counts.count(rows, step.tensors) for rows in parts]).sum(0)
    step.counts.share(step.ranks.sum(counts.to(step.device)), step.tensors)


class GradientPhase:
    """Runs the graph of a step on micro-batches. Collective: all ranks run as many.

    `accumulate`: the largest number of micro-batches. `batch`: as in `Trainer`. `taken`: what takes each gradient as soon as
    it is summed over micro-batches and ranks, instead of `run` returning it. `regions`: where compiled kernels are kept.
    """

    def __init__(
        self,
        step: StepProgram,
        accumulate: int = 1,
        batch: str = WHOLE,
        taken: Taken | None = None,
        regions: CompiledRegions | None = None,
    ) -> None:
        self._step, self._taken, self._regions = step, taken, regions
        self._accumulate, self._batch = accumulate, batch
        self._runner = Runner(step, None, taken, regions)

    def micro_batches(self, checked: Rows, rows: Rows) -> list[Rows]:
        """The parts of this rank's `rows` that the graph is run on; `checked` is what the rank was given.

        As many on all ranks, and no more than any rank has rows; their sizes differ by one row at most. Collective if ranks
        bring rows of their own.
        """
        if self._accumulate == 1:
            return [rows]
        axes, ranks = self._step.rows, self._step.ranks
        fewest = axes.count(checked)
        if self._batch == WHOLE:
            fewest //= ranks.size
        elif ranks.size > 1:
            fewest = int(ranks.gather(torch.tensor([fewest], device=self._step.device)).min())
        count = max(1, min(self._accumulate, fewest))
        return [axes.share(rows, index, count) for index in range(count)]

    def run(self, parts: Sequence[Rows]) -> StepOutput:
        """The loss, count and gradients, summed over micro-batches and ranks, and the new values of buffers.

        Where it fails it still takes part in the collectives of all micro-batches.
        """
        share_items(self._step, parts)
        if len(parts) == 1:
            return self._runner.run(self._placed(parts[0]))
        first, middle, last = self._runners
        runners = [first, *[middle] * (len(parts) - 2), last]
        sums: dict[str, torch.Tensor] = {}
        buffers: dict[str, torch.Tensor] = {}
        begun = 0
        try:
            for runner, rows in zip(runners[:-1], parts):
                begun += 1
                found, buffers = runner.call(self._placed(rows), {**sums, **buffers})
                sums = dict(zip(self._micro.names, found))
            begun += 1
            return last.run(self._placed(parts[-1]), {**sums, **buffers})
        finally:
            for runner in runners[begun:]:  # none unless it failed
                runner.take_part()

    def keep(self, output: StepOutput) -> None:
        """Write the new values of buffers in place."""
        self._runner.keep(output)

    def _placed(self, rows: Rows) -> Rows:
        return {name: value.to(self._step.device) for name, value in rows.items()}

    @cached_property
    def _micro(self) -> MicroSteps:
        return micro_steps(self._step)

    @cached_property
    def _runners(self) -> tuple[Runner, Runner, Runner]:
        buffers = self._runner.buffers
        steps, regions = (self._micro.first, self._micro.middle), self._regions
        first, middle = (Runner(step, buffers, None, regions) for step in steps)
        return first, middle, Runner(self._micro.last, buffers, self._taken, regions)
