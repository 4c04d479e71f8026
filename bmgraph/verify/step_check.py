"""Compares a training step before and after a pass of the step stage: loss, count, every gradient whole, buffers, updates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import VerificationError
from bmgraph.ops.index_bounds import checked_indices
from bmgraph.ops.traits import is_random
from bmgraph.training.executor import Runner, StepOutput
from bmgraph.training.step_program import StepProgram
from bmgraph.verify.gradients import Distances, Gradients, own_part
from bmgraph.verify.metrics import relative_error
from bmgraph.verify.step_run import Batch, shortened, why_not_run, without_dropout
from bmgraph.verify.update_check import UpdateReference, check_places

LOSS_TOLERANCE = 1e-5
"""Largest relative error of the loss and the count: their sums may have another order."""

GRADIENT_TOLERANCE = 1e-4
"""Largest error of a gradient, relative to its norm (L2)."""

HALF_TOLERANCE = 8.0
"""The same of a step that computes in half precision, in units of its last bit: values are rounded at other places."""

MEMORY_LIMIT = 2 * 2**30
"""Largest size, in bytes, of the whole parameters with their gradients that the check may hold on a rank."""

LONGEST = 32
"""The size of free axes of the batch that is compared: the time of a comparison is that of its parameters then."""

SEED = 0


@dataclass(frozen=True)
class StepReference:
    """What a step computes on a batch, on all ranks together; `skipped` says why nothing was compared.

    Of each gradient a rank keeps its part alone (`own_part`).
    """

    batch: Batch
    loss: float = 0.0
    count: float = 0.0
    gradients: Gradients | None = None
    buffers: Mapping[str, torch.Tensor] | None = None
    updates: UpdateReference | None = None
    skipped: str = ""
    rounding: float = 0.0
    """HALF_TOLERANCE in terms of the dtype that the step computes in."""

    @staticmethod
    def take(step: StepProgram, batch: Batch) -> StepReference:
        """Run a step that no pass has shared yet on this rank alone, on the beginning of a batch (see `shortened`)."""
        why = why_not_run(step, batch, MEMORY_LIMIT)
        if why:
            return StepReference(batch, skipped=why)
        if step.shared:
            return StepReference(batch, skipped="an earlier pass shared its tensors")
        if step.gathered:
            return _taken_together(step, _enough_rows(step, batch))
        batch, found = _first_run(step, _enough_rows(step, batch))
        return StepReference(
            batch,
            float(found.loss),
            float(found.count),
            _parts(found, step),
            dict(found.buffers),
            UpdateReference.take(step),
            rounding=rounding_of(step.compute),
        )

    def rerun(self, step: StepProgram) -> StepReference:
        """The same of a step after a pass. Collective.

        Raises VerificationError on all ranks if the step does not run, or is not the same on all ranks.
        """
        step.ranks.check_same("step after the pass", {"graph": step.digest()}, "the same pass")
        if self.gradients is None:
            return self
        with step.ranks.fail_together():  # the runner takes part in all collectives, even where it fails
            try:
                found = _run(step, _rows_of_rank(step, self.batch))
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise VerificationError(f"the step no longer runs: {first[:200]}") from error
        if step.gathered and not step.shared:
            found = _summed(step, found)
        # where ranks do not share the rows, all have run all of them
        times = step.ranks.size if step.shared and not _shares_rows(step) else 1
        parts = {
            part: own_part(value, step.ranks) / times if times > 1 else own_part(value, step.ranks)
            for name in list(found.gradients)  # each is let go as soon as it was whole
            for part, value in step.updates[name].gradient.join(found.gradients.pop(name), step.ranks).items()
        }
        buffers = dict(found.buffers) if step.ranks.size == 1 else {}
        return StepReference(
            self.batch,
            float(found.loss) / times,
            float(found.count) / times,
            parts,
            buffers,
            rounding=rounding_of(step.compute),
        )

    def distances_to(self, now: StepReference, ranks: Ranks) -> Distances:
        """How far the gradients of another reference are from these. Collective, and what fails on one rank fails on all."""
        assert self.gradients is not None
        assert now.gradients is not None
        with ranks.fail_together():
            own = Distances.between(now.gradients, self.gradients, list(self.gradients))
        device = next((value.device for value in self.gradients.values()), torch.device("cpu"))
        return own.over(ranks, device)

    def check_same(self, now: StepReference, moved: Distances) -> None:
        """Raise VerificationError if the loss, the count, a gradient or a written buffer is another; `moved` are the
        distances to `now`."""
        for what, found, expected in (("loss", now.loss, self.loss), ("count", now.count, self.count)):
            tolerance = LOSS_TOLERANCE if what == "count" else max(LOSS_TOLERANCE, self.rounding)
            if not abs(found - expected) <= tolerance * max(abs(expected), 1e-6):
                raise VerificationError(f"the {what} is {found:.6g}, and was {expected:.6g}")
        self._check_names(now)
        allowed = max(GRADIENT_TOLERANCE, self.rounding)
        wrong = moved.beyond(allowed)
        if wrong:
            worst = max(wrong, key=lambda name: wrong[name])
            raise VerificationError(
                f"{len(wrong)} of {len(moved.errors)} gradients changed, most that of {worst!r} (by {wrong[worst]:.2g} of its norm)"
            )
        for name, value in (self.buffers or {}).items():
            found_buffer = (now.buffers or {}).get(name)
            if found_buffer is not None and not relative_error(found_buffer, value) <= allowed:
                raise VerificationError(f"the new value of buffer {name!r} changed")

    def check_updates(self, step: StepProgram) -> None:
        """Raise VerificationError on all ranks unless a step makes the updates that it made before. Collective."""
        if self.updates is not None:
            self.updates.check(step)

    def with_updates_of(self, step: StepProgram) -> StepReference:
        """This reference with the updates that a step makes."""
        return replace(self, updates=None if step.shared else UpdateReference.take(step))

    def drift_to(self, now: StepReference, moved: Distances) -> tuple[float, str]:
        """The largest relative L2 change of the loss and the gradients, and where it is; `moved` are the distances to `now`.

        Raises VerificationError if the count is another, or other parameters have a gradient: no pass may change these.
        """
        self._check_names(now)
        if not abs(now.count - self.count) <= LOSS_TOLERANCE * abs(self.count):
            raise VerificationError(f"the count is {now.count:.6g}, and was {self.count:.6g}")
        errors = {"the loss": abs(now.loss - self.loss) / max(abs(self.loss), 1e-6)}
        errors |= {f"the gradient of {name!r}": error for name, error in moved.relative().items()}
        worst = max(errors, key=lambda name: _size(errors[name]))
        return _size(errors[worst]), worst

    def _check_names(self, now: StepReference) -> None:
        lost = sorted(set(self.gradients or ()) ^ set(now.gradients or ()))
        if lost:
            raise VerificationError(f"other parameters have a gradient than before: {', '.join(lost[:3])}")

    def describe(self) -> str:
        """What is compared, in words."""
        rows = "x".join(map(str, next(iter(self.batch.values())).shape))
        return f"loss and {len(self.gradients or ())} gradients on {rows}"


def _parts(found: StepOutput, step: StepProgram) -> Gradients:
    """This rank's parts of whole gradients, which are let go."""
    return {name: own_part(found.gradients.pop(name), step.ranks) for name in list(found.gradients)}


def rounding_of(compute: torch.dtype) -> float:
    """How far values of a step that computes in a dtype may be rounded at other places."""
    return 0.0 if compute == torch.float32 else HALF_TOLERANCE * torch.finfo(compute).eps


def _size(error: float) -> float:
    """NaN is the largest error."""
    return float("inf") if error != error else error


def check_step(step: StepProgram) -> None:
    """Raise VerificationError unless a step is legal: its graph is well formed, it holds every tensor that it reads, and
    values, gradients and optimizer states are where they are said to be."""
    try:
        step.graph.lint()
    except (RuntimeError, ValueError, AssertionError) as error:
        raise VerificationError(f"the step's graph is not well formed: {error}") from error
    for name, node in step.reads().items():
        if name not in step.tensors:
            raise VerificationError(f"node {node.name} reads {name!r}, which the step does not have")
    returned = step.returned()
    if len(returned) != 2 + len(step.trained) + len(step.writes):
        raise VerificationError(
            f"the step returns {len(returned)} values, its names are {2 + len(step.trained) + len(step.writes)}"
        )
    check_places(step)


def check_random(before: StepProgram, after: StepProgram) -> None:
    """Raise VerificationError if a step makes other random calls than before: twice dropped out is not dropped out alike.

    The comparison of losses and gradients runs without dropout, and does not see it.
    """
    counts = [
        Counter(str(node.target) for node in step.graph.nodes if is_random(node)) for step in (before, after)
    ]
    for name in sorted(counts[0].keys() | counts[1].keys()):
        if counts[0][name] != counts[1][name]:
            raise VerificationError(
                f"the step calls the random {name} {counts[1][name]} times, and did {counts[0][name]}"
            )


def _run(step: StepProgram, batch: Batch) -> StepOutput:
    """One run without dropout, on the device of the step."""
    copy = replace(step, graph=without_dropout(step))
    with torch.random.fork_rng(devices=[]), checked_indices(step.device):
        torch.manual_seed(SEED)
        return Runner(copy).run({name: value.to(step.device) for name, value in batch.items()})


def _first_run(step: StepProgram, batch: Batch) -> tuple[Batch, StepOutput]:
    """A run on a short form of the batch, or on all of it where the short one has no loss that could be compared."""
    short = shortened(step, batch, LONGEST)
    if short is not batch:
        try:
            found = _run(step, short)
        except (RuntimeError, IndexError, TypeError, ValueError):  # a label may point behind its end
            return batch, _run(step, batch)
        if float(found.count) > 0 and math.isfinite(float(found.loss)):
            return short, found
    return batch, _run(step, batch)


def _taken_together(step: StepProgram, batch: Batch) -> StepReference:
    """The reference of a step whose loss reads the rows of all ranks: each runs its own, and sums are taken over ranks."""
    with step.ranks.fail_together():  # the runner takes part in all collectives, even where it fails
        found = _run(step, _rows_of_rank(step, batch))
    found = _summed(step, found)
    return StepReference(
        batch,
        float(found.loss),
        float(found.count),
        _parts(found, step),
        {},
        UpdateReference.take(step),
        rounding=rounding_of(step.compute),
    )


def _summed(step: StepProgram, found: StepOutput) -> StepOutput:
    """Loss, count and gradients summed over ranks."""
    gradients = {name: step.ranks.sum(value) for name, value in found.gradients.items()}
    return StepOutput(step.ranks.sum(found.loss), step.ranks.sum(found.count), gradients, {})


def _enough_rows(step: StepProgram, batch: Batch) -> Batch:
    """The batch, with its rows repeated where there are fewer than ranks; as many for each rank where they are gathered."""
    axes = step.rows.axes
    if not axes:
        return batch
    count, ranks = step.rows.count(batch), step.ranks.size
    wanted = -(-count // ranks) * ranks if step.gathered else max(count, ranks)
    if count == wanted:
        return batch
    rows = torch.arange(wanted) % count
    return {
        name: value.index_select(axes[name], rows.to(value.device)) if name in axes else value
        for name, value in batch.items()
    }


def _shares_rows(step: StepProgram) -> bool:
    """Whether ranks that run shares of a batch give what one does that runs all of it: not if they take statistics of
    their rows, or compute a term of the loss on them. Where they gather rows they never run all of it."""
    alone = not step.rows.statistics and not step.by_part
    return bool(step.rows.axes) and (alone or bool(step.gathered))


def _rows_of_rank(step: StepProgram, batch: Batch) -> Batch:
    """This rank's rows of a batch, if ranks share the step or read each other's rows."""
    if not (step.shared or step.gathered) or not _shares_rows(step):
        return batch
    return step.rows.share(batch, step.ranks.rank, step.ranks.size)
