"""How the learning rate goes: the share of the optimizer's `lr` at each step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from bmgraph.errors import InputError


@dataclass(frozen=True)
class Schedule(ABC):
    """`warmup` steps of a rate that grows evenly to its peak, the optimizer's `lr`; then what the class says."""

    warmup: int = 0

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise InputError(f"warmup={self.warmup}: give a number of steps")

    def share(self, step: int) -> float:
        """The share of the peak at a step; the first step is 1."""
        return step / self.warmup if step < self.warmup else self.after(step)

    @abstractmethod
    def after(self, step: int) -> float:
        """The share of the peak from the end of the warm-up on."""


@dataclass(frozen=True)
class Constant(Schedule):
    """The peak, for good.

    Example:
        >>> [Constant(warmup=4).share(step) for step in (1, 2, 4, 100)]
        [0.25, 0.5, 1.0, 1.0]
    """

    def after(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Noam(Schedule):
    """Falls with the inverse square root of the step (Vaswani et al. 2017, with the peak given by `lr`)."""

    warmup: int = 4000

    def after(self, step: int) -> float:
        return math.sqrt(max(1, self.warmup) / step)


@dataclass(frozen=True)
class _Falling(Schedule):
    """Falls until step `steps`, and stays there."""

    steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps <= self.warmup:
            raise InputError(f"steps={self.steps}: give more than the {self.warmup} of warmup")

    def done(self, step: int) -> float:
        """The share of the fall that lies behind: 0 at the end of the warm-up, 1 at `steps`."""
        return min(1.0, (step - self.warmup) / (self.steps - self.warmup))


@dataclass(frozen=True)
class Linear(_Falling):
    """Falls evenly to 0 at step `steps`."""

    def after(self, step: int) -> float:
        return 1.0 - self.done(step)


@dataclass(frozen=True)
class Cosine(_Falling):
    """Falls along half a cosine to 0 at step `steps` (Loshchilov and Hutter 2017)."""

    def after(self, step: int) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * self.done(step)))
