"""Learning-rate schedules: the fraction of the peak rate, the optimizer's `lr`, at each step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from bmgraph.errors import InputError


@dataclass(frozen=True)
class Schedule(ABC):
    """A linear warm-up over `warmup` steps to the peak, then the decay of the subclass."""

    warmup: int = 0

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise InputError(f"warmup={self.warmup}: give 0 or more steps")

    def share(self, step: int) -> float:
        """The fraction of the peak at a step; the first step is 1."""
        return step / self.warmup if step < self.warmup else self.after(step)

    @abstractmethod
    def after(self, step: int) -> float:
        """The fraction of the peak at a step after the warm-up."""


@dataclass(frozen=True)
class Constant(Schedule):
    """Stays at the peak.

    Example:
        >>> [Constant(warmup=4).share(step) for step in (1, 2, 4, 100)]
        [0.25, 0.5, 1.0, 1.0]
    """

    def after(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Noam(Schedule):
    """Decays with the inverse square root of the step (Vaswani et al. 2017; here `lr` is the peak).

    Example:
        >>> [Noam(warmup=4).share(step) for step in (2, 4, 16)]
        [0.5, 1.0, 0.5]
    """

    warmup: int = 4000

    def after(self, step: int) -> float:
        return math.sqrt(max(1, self.warmup) / step)


@dataclass(frozen=True)
class _Decay(Schedule):
    """Decays until step `steps`, then stays constant."""

    steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps <= self.warmup:
            raise InputError(f"steps={self.steps}: give more than the {self.warmup} of warmup")

    def progress(self, step: int) -> float:
        """The completed fraction of the decay: 0 at the end of the warm-up, 1 from `steps` on."""
        return min(1.0, (step - self.warmup) / (self.steps - self.warmup))


@dataclass(frozen=True)
class Linear(_Decay):
    """Decays linearly to 0 at step `steps`.

    Example:
        >>> [Linear(steps=10).share(step) for step in (5, 10, 20)]
        [0.5, 0.0, 0.0]
    """

    def after(self, step: int) -> float:
        return 1.0 - self.progress(step)


@dataclass(frozen=True)
class Cosine(_Decay):
    """Decays along half a cosine to 0 at step `steps` (Loshchilov and Hutter 2017).

    Example:
        >>> [round(Cosine(steps=10).share(step), 3) for step in (5, 10)]
        [0.5, 0.0]
    """

    def after(self, step: int) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * self.progress(step)))
