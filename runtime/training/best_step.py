"""The step of a training run that an evaluation found best, and when none has been better for too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from bmgraph.runtime.training.checkpoint_sections import Found, Section, Take
from bmgraph.runtime.training.evaluation import Evaluation

LOSS = "loss"
"""The figure of which less is better."""


@dataclass(frozen=True)
class Best:
    """The best evaluated step by a `figure`, its `value`, and its checkpoint, None if nothing was saved."""

    step: int
    figure: str
    value: float
    path: Path | None


class BestStep(Section):
    """Compares evaluations by one figure; a section of checkpoints, so that a resumed run stops where the whole one would."""

    name = "best"

    def __init__(self, figure: str) -> None:
        self.figure = figure
        self.step, self.value, self.waited = 0, 0.0, 0
        """The best step (0: none yet), its figure, and the evaluations since."""

    def see(self, step: int, evaluation: Evaluation) -> bool:
        """Take an evaluation into account; whether it is the best so far. One that is not finite is not."""
        value = evaluation.loss if self.figure == LOSS else evaluation.measures[self.figure]
        gain = self.value - value if self.figure == LOSS else value - self.value
        if not isfinite(value) or (self.step and gain <= 0):
            self.waited += 1
            return False
        self.step, self.value, self.waited = step, value, 0
        return True

    def stops(self, patience: int | None) -> bool:
        """Whether so many evaluations were no better."""
        return patience is not None and self.waited >= patience

    def saved(self) -> dict[str, Any]:
        return {"figure": self.figure, "step": self.step, "value": self.value, "waited": self.waited}

    def checked(self, found: Sequence[Found], notes: list[str]) -> Take:
        if not found or found[0].get("figure", str) != self.figure:
            of = f"by {found[0].get('figure', str)!r}" if found else "not known"
            notes.append(
                f"the checkpoint's best step is {of}: the best by {self.figure!r} is looked for anew"
            )
            return lambda: self._take(0, 0.0, 0)
        (own,) = found
        fields = own.get("step", int, 0), own.get("value", float), own.get("waited", int, 0)
        return lambda: self._take(*fields)

    def _take(self, step: int, value: float, waited: int) -> None:
        self.step, self.value, self.waited = step, value, waited
