"""Updates each trained tensor while backward goes on, so that gradients need not all be kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from bmgraph.errors import InputError
from bmgraph.runtime.training.finite_check import not_finite, suspects
from bmgraph.runtime.training.inspection import Inspector
from bmgraph.runtime.training.step_guard import StepGuard
from bmgraph.training.optimizers import Optimizer
from bmgraph.training.precision import STOP
from bmgraph.training.update_phase import UpdatePhase


class UpdateInBackward:
    """Takes the gradients of a step one by one and updates with them at once.

    A loss that is not finite and a batch without items are found before the first update. A step that fails later has
    updated some tensors: then `failed` says so, and only a checkpoint restores them.
    """

    def __init__(self, update: UpdatePhase, guard: StepGuard, inspector: Inspector) -> None:
        self._update, self._guard, self._inspector = update, guard, inspector
        self.failed = ""
        """Why the tensors on this rank are those of no step; empty if all are well."""
        self._rule: Optimizer | None = None
        self._rate, self._count = 0.0, 0.0
        self._batch: Mapping[str, torch.Tensor] = {}
        self._updated = 0

    @contextmanager
    def during(self, rule: Optimizer, rate: float, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Update with this rule and rate while a step runs."""
        self._rule, self._rate, self._batch, self._updated = rule, rate, batch, 0
        ended = False
        try:
            yield
            ended = True
        finally:
            self._batch = {}
            if not ended and self._updated:
                self.failed = f"the last step failed when {self._updated} tensors were updated already: load a checkpoint"

    def take(self, name: str, gradient: torch.Tensor, loss: torch.Tensor, count: torch.Tensor) -> None:
        """Update one tensor with its summed gradient. Raises InputError if loss or gradient are not finite, or nothing counts."""
        if not self._updated:
            self._count = counted(count)
            self._guard.found(float(loss) / self._count, {}, self._batch)
        mean = {name: self._update.mean(name, gradient, self._count)}
        found = not_finite(0.0, mean)
        if found:
            raise InputError(
                f"{found}, when {self._updated} tensors were updated already (optimizer_in_backward=True): load a checkpoint; "
                f"{suspects(self._batch)}"
            )
        self._inspector.see(mean)
        assert self._rule is not None
        self._updated += 1
        self._update.move(self._rule, mean, self._rate)


def counted(count: torch.Tensor) -> float:
    """The number of items of a step; raises InputError if there is none."""
    items = float(count)
    if not items > 0:
        raise InputError("no item of the batch counts for the loss: every label is ignored")
    # ranks may each have counted their part of whole items
    return float(round(items)) if abs(items - round(items)) < 1e-9 * items else items


def check_in_backward(update: UpdatePhase, clip_norm: float | None, on_nan: str, scaled: bool) -> None:
    """Raise InputError for settings that need all gradients before the first update."""
    reasons = {
        f"clip_norm={clip_norm}: the norm of all gradients": clip_norm is not None,
        f"on_nan={on_nan!r}: whether the step is skipped": on_nan != STOP,
        "precision='fp16': whether a gradient overflows": scaled,
        "ZeRO(1) and ZeRO(2), where each rank updates a part of a value that all hold whole: all gradients": update.is_gathered,
    }
    for reason, applies in reasons.items():
        if applies:
            raise InputError(
                f"optimizer_in_backward=True does not go with {reason} must be known before the first update"
            )
