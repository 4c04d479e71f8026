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


@dataclass(frozen=True)
class Exponential(Schedule):
    """Multiplies the rate by `gamma` at each step after the warm-up.

    Example:
        >>> [round(Exponential(warmup=2, gamma=0.5).share(step), 3) for step in (1, 2, 3, 4)]
        [0.5, 1.0, 0.5, 0.25]
    """

    gamma: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gamma <= 1:
            raise InputError(f"gamma={self.gamma}: give a factor above 0, of 1 at most")

    def after(self, step: int) -> float:
        return self.gamma ** (step - self.warmup)


@dataclass(frozen=True)
class WSD(Schedule):
    """Warm-up, stable, decay (Hu et al. 2024): stays at the peak, then falls linearly to 0 over the last `decay` of `steps`.

    Example:
        >>> [WSD(warmup=2, steps=10, decay=4).share(step) for step in (1, 2, 6, 8, 10, 20)]
        [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    """

    steps: int = 1000
    decay: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay <= self.steps - self.warmup:
            raise InputError(
                f"decay={self.decay}: give 1 or more steps, and no more than are left of steps={self.steps} after "
                f"warmup={self.warmup}"
            )

    def after(self, step: int) -> float:
        return min(1.0, max(0.0, (self.steps - step) / self.decay))
