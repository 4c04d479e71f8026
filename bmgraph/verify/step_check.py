"""Compares a training step before and after a pass of the step stage: loss, count, every gradient whole, buffers, updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from bmgraph.errors import VerificationError
from bmgraph.training.executor import Runner, StepOutput
from bmgraph.training.step_program import StepProgram
from bmgraph.verify.gradients import Gradients, differences
from bmgraph.verify.metrics import relative_error
from bmgraph.verify.update_check import UpdateReference

LOSS_TOLERANCE = 1e-5
"""Largest relative error of the loss and the count: their sums may have another order."""

GRADIENT_TOLERANCE = 1e-4
"""Largest error of a gradient, relative to its norm (L2)."""

MEMORY_LIMIT = 2 * 2**30
"""Largest size, in bytes, of the whole parameters with their gradients that the check may hold on a rank."""

SEED = 0

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class StepReference:
    """What a step computes on a batch; `skipped` says why nothing was compared."""

    batch: Batch
    loss: float = 0.0
    count: float = 0.0
    gradients: Gradients | None = None
    buffers: Mapping[str, torch.Tensor] | None = None
    updates: UpdateReference | None = None
    skipped: str = ""

    @staticmethod
    def take(step: StepProgram, batch: Batch) -> StepReference:
        """Run a step that no pass has shared yet on this rank alone, on all rows of a batch."""
        if not batch:
            return StepReference(batch, skipped="the program has no example")
        size = sum(tensor.numel() * tensor.element_size() for tensor in step.tensors.values())
        if 2 * size > MEMORY_LIMIT:
            return StepReference(batch, skipped=f"it would hold {2 * size / 2**30:.1f} GiB on each rank")
        if step.shared:
            return StepReference(batch, skipped="an earlier pass shared its tensors")
        batch = _enough_rows(step, batch)
        found = _run(step, batch)
        return StepReference(
            batch,
            float(found.loss),
            float(found.count),
            dict(found.gradients),
            dict(found.buffers),
            UpdateReference.take(step),
        )

    def check(self, step: StepProgram) -> str:
        """What was compared of a step after a pass, in words. Collective.

        Raises VerificationError on all ranks if the loss, the count, a gradient, a written buffer or a tensor is another.
        """
        step.ranks.check_same("step after the pass", {"graph": step.digest()}, "the same pass")
        if self.gradients is None:
            return f"structure alone: {self.skipped}"
        with step.ranks.fail_together():  # the runner takes part in all collectives, even where it fails
            try:
                found = _run(step, _rows_of_rank(step, self.batch))
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise VerificationError(f"the step no longer runs: {first[:200]}") from error
        whole = {
            part: value
            for name, gradient in found.gradients.items()
            for part, value in step.updates[name].gradient.join(gradient, step.ranks).items()
        }
        with step.ranks.fail_together():
            self._compare(step, found, whole)
        if self.updates is not None:
            self.updates.check(step)
        rows = "x".join(map(str, next(iter(self.batch.values())).shape))
        return f"loss and {len(whole)} gradients on {rows}"

    def _compare(self, step: StepProgram, found: StepOutput, gradients: Gradients) -> None:
        assert self.gradients is not None
        # where ranks do not share the rows, all have run all of them
        times = step.ranks.size if step.shared and not _shares_rows(step) else 1
        for what, mine, theirs in (
            ("loss", float(found.loss), times * self.loss),
            ("count", float(found.count), times * self.count),
        ):
            if not abs(mine - theirs) <= LOSS_TOLERANCE * max(abs(theirs), 1e-6):
                raise VerificationError(f"the {what} is {mine:.6g}, and was {theirs:.6g}")
        if set(gradients) != set(self.gradients):
            lost = sorted(set(self.gradients) ^ set(gradients))
            raise VerificationError(f"other parameters have a gradient than before: {', '.join(lost[:3])}")
        expected = {name: times * gradient for name, gradient in self.gradients.items()}
        wrong = differences(gradients, expected, list(expected), GRADIENT_TOLERANCE, {})
        if wrong:
            worst = max(wrong, key=lambda name: wrong[name])
            raise VerificationError(
                f"{len(wrong)} of {len(expected)} gradients changed, most that of {worst!r} (by {wrong[worst]:.2g} of its norm)"
            )
        for name, value in (self.buffers or {}).items() if step.ranks.size == 1 else ():
            if name in found.buffers and not relative_error(found.buffers[name], value) <= GRADIENT_TOLERANCE:
                raise VerificationError(f"the new value of buffer {name!r} changed")


def _run(step: StepProgram, batch: Batch) -> StepOutput:
    """One run without dropout, on the device of the step."""
    copy = replace(step, graph=torch.fx.Graph())
    copy.graph.output(copy.graph.graph_copy(step.graph, {}))
    for node in copy.graph.nodes:
        if node.target is torch.ops.aten.native_dropout.default:
            node.update_arg(1, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Runner(copy).run({name: value.to(step.device) for name, value in batch.items()})


def _enough_rows(step: StepProgram, batch: Batch) -> Batch:
    """The batch, with its rows repeated where there are fewer than ranks."""
    axes = step.rows.axes
    if not axes:
        return batch
    count = step.rows.count(batch)
    if count >= step.ranks.size:
        return batch
    rows = torch.arange(step.ranks.size) % count
    return {
        name: value.index_select(axes[name], rows.to(value.device)) if name in axes else value
        for name, value in batch.items()
    }


def _shares_rows(step: StepProgram) -> bool:
    """Whether ranks that run shares of a batch give what one does that runs all of it: not if they take statistics of
    their rows."""
    return bool(step.rows.axes) and not step.rows.statistics


def _rows_of_rank(step: StepProgram, batch: Batch) -> Batch:
    """This rank's rows of a batch, if ranks share the step."""
    if not step.shared or not _shares_rows(step):
        return batch
    return step.rows.share(batch, step.ranks.rank, step.ranks.size)
