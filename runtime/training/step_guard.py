"""Decides, for all ranks alike, whether an update is made of a step's numbers, and holds the loss scale of steps in float16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from bmgraph.errors import InputError
from bmgraph.runtime.training.checkpoint_sections import Found, Section, Take
from bmgraph.runtime.training.finite_check import not_finite, suspects
from bmgraph.training.loss_scale import LEAST, MOST, LossScale
from bmgraph.training.precision import SCALE, STOP
from bmgraph.training.step_program import StepProgram
from bmgraph.training.update_phase import UpdatePhase


class StepGuard(Section):
    """What happens to a step whose numbers are not finite. `on_nan`, `max_skips`: as in `Torch`.

    In float16 a gradient that is not finite is an overflow: the scale is halved and the step skipped, whatever `on_nan` says,
    until the scale is 1.
    """

    name: ClassVar[str] = "update"

    def __init__(
        self, step: StepProgram, update: UpdatePhase, on_nan: str, max_skips: int, loss_scale: LossScale
    ) -> None:
        self._step, self._update = step, update
        self._on_nan, self._max_skips, self.rule = on_nan, max_skips, loss_scale
        self._skips = 0
        """Steps that were skipped one after the other, but for overflows that the loss scale mends."""
        self.scale: float | None = None
        """The loss scale of the next step; None if losses are not scaled."""
        self._good = 0
        if SCALE in step.tensors:
            self._set_scale(loss_scale.start)

    def found(self, loss: float, means: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> str:
        """What is not finite on this rank, in words; empty if nothing is.

        Raises InputError if there is something and no step can be skipped.
        """
        found = not_finite(loss, means)
        if found and self.scale is None and self._on_nan == STOP:
            raise _stopped(found, batch)
        return found

    def skips(self, found: str, loss: float, batch: Mapping[str, torch.Tensor]) -> str:
        """Why this step makes no update, the same on all ranks; empty if it makes one. Changes the loss scale.

        `found`: what is not finite on this rank. Collective, if steps can be skipped. Raises InputError, on all ranks, if the step
        is to stop, or if too many were skipped one after the other.
        """
        if self.scale is None and self._on_nan == STOP:
            return ""
        ranks = self._step.ranks
        flag = torch.tensor(float(bool(found)), device=self._step.device)
        if not float(ranks.sum(flag)):
            self._move_scale(overflow=False)
            self._skips = 0
            return ""
        first = next(text for text in ranks.gather_texts(found) if text)
        scale = self.scale
        overflow = scale is not None and scale > LEAST and abs(loss) < float("inf")
        if not overflow and self._on_nan == STOP:
            raise _stopped(first, batch)
        if overflow:
            self._move_scale(overflow=True)
            return f"{first}: an overflow at loss scale {scale:g}, which is {self.scale:g} from now on"
        if self._skips >= self._max_skips:
            raise InputError(
                f"{self._skips} steps one after the other were skipped, and this one would be: {first}; {suspects(batch)}; go "
                "back to an earlier checkpoint, with a lower learning rate or other data, or allow more by Torch(max_skips=)"
            )
        self._skips += 1
        return first

    def saved(self) -> dict[str, Any]:
        """The number of updates, steps that were just skipped, and the loss scale."""
        found: dict[str, Any] = {"updates": self._update.count}
        if self._skips:
            found["skips"] = self._skips
        return found if self.scale is None else {**found, "scale": self.scale, "good": self._good}

    def checked(self, found: Sequence[Found], notes: list[str]) -> Take:
        """Take over the number of updates and, if both have one, the loss scale."""
        if not found:
            return lambda: None
        (item,) = found
        updates = item.get("updates", int, least=0)
        skips = item.get("skips", int, least=0) if "skips" in item.fields else 0
        scale, good = self.rule.start, 0
        if self.scale is not None and "scale" in item.fields:
            scale, good = item.get("scale", float, least=LEAST), item.get("good", int, least=0)
            scale = min(scale, MOST)

        def take() -> None:
            self._update.count, self._skips = updates, skips
            if self.scale is not None:
                self._set_scale(scale)
                self._good = good

        return take

    def _move_scale(self, overflow: bool) -> None:
        if self.scale is not None:
            scale, self._good = self.rule.after(self.scale, self._good, overflow)
            self._set_scale(scale)

    def _set_scale(self, scale: float) -> None:
        self.scale = scale
        self._step.tensors[SCALE].fill_(scale)


def _stopped(found: str, batch: Mapping[str, torch.Tensor]) -> InputError:
    return InputError(f"{found}, so the step was not taken and nothing was changed; {suspects(batch)}")
