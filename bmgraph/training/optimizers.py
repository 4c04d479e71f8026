"""Optimizer configurations, for whole tensors or shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from bmgraph.errors import InputError

NoDecay = bool | tuple[str, ...]
"""What is not decayed: True for the parameters of norms, biases and embeddings, or globs of names or module paths."""

Moments = dict[str, torch.Tensor]
"""The elementwise state of one tensor, by torch.optim's names."""


@dataclass(frozen=True)
class Optimizer(ABC):
    """The configuration of an elementwise optimizer, and its rule.

    Elementwise: the update of an element depends on its own gradients alone, so that a shard of a parameter is updated
    as the whole parameter would be, wherever it lives. Raises InputError for a number that is negative or NaN.
    """

    moments: ClassVar[tuple[str, ...]] = ()
    """torch.optim's names of its elementwise state."""
    squares: ClassVar[tuple[str, ...]] = ()
    """Those of its moments that are never negative."""

    lr: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not value >= 0:
                raise InputError(f"{field.name}={value}: give a number of 0 or more")

    @abstractmethod
    def update(
        self,
        values: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        moments: Sequence[Moments],
        rate: float,
        updates: int,
    ) -> None:
        """Update tensors and their moments in place with a learning rate; moments that a tensor does not have yet are added.

        A gradient has the shape, dtype and device of its tensor. `updates` counts those that the moments have seen, with
        this one.
        """

    @property
    def kept_moments(self) -> int:
        """How many moments of each element are kept."""
        return len(self.moments) if self.keeps_moments({}) else 0

    def keeps_moments(self, settings: Mapping[str, object]) -> bool:
        """Whether an optimizer of this kind holds its moments once it has made a step; `settings` are its fields by name."""
        return bool(self.moments)

    @property
    def exempt(self) -> NoDecay:
        """Which parameters are updated by `without_decay()` instead; none by default."""
        return False

    def without_decay(self) -> Optimizer:
        """The same optimizer without weight decay; itself if it has none."""
        return self


class _Decaying(Optimizer):
    """An optimizer with weight decay, from which parameters can be exempt; each declares these fields in its own order."""

    weight_decay: float
    no_decay: NoDecay

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_no_decay(self.no_decay)

    @property
    def exempt(self) -> NoDecay:
        return self.no_decay

    def without_decay(self) -> Self:
        changed: dict[str, Any] = {"weight_decay": 0.0}
        return replace(self, **changed)


@dataclass(frozen=True)
class AdamW(_Decaying):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), in one fused kernel where torch has it.

    no_decay: what weight decay leaves alone. True, the default: parameters of norms, biases and embedding tables, as they are
    found in the structure; False: nothing; or globs of parameter names or module paths.

    Example:
        >>> AdamW(lr=1e-4).weight_decay
        0.01
    """

    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    squares: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    no_decay: NoDecay = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_betas(self.betas)

    def update(
        self,
        values: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        moments: Sequence[Moments],
        rate: float,
        updates: int,
    ) -> None:
        _start(self.moments, values, moments)
        fused = _has_fused(values)
        first, second = ([held[key] for held in moments] for key in self.moments)
        adamw(
            list(values),
            list(gradients),
            first,
            second,
            [],
            [torch.full((), float(updates - 1), device=value.device if fused else "cpu") for value in values],
            fused=fused,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=rate,
            weight_decay=self.weight_decay,
            eps=self.eps,
            maximize=False,
        )


@dataclass(frozen=True)
class SGD(_Decaying):
    """Stochastic gradient descent, with momentum if it is not 0, in one fused kernel where torch has it.

    no_decay: what weight decay leaves alone, as in `AdamW`.

    Example:
        >>> SGD(lr=0.1, momentum=0.9).momentum
        0.9
    """

    moments: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    lr: float = 1e-2
    momentum: float = 0.0
    weight_decay: float = 0.0
    no_decay: NoDecay = True

    def update(
        self,
        values: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        moments: Sequence[Moments],
        rate: float,
        updates: int,
    ) -> None:
        buffers = [held.get("momentum_buffer") for held in moments]
        sgd(
            list(values),
            list(gradients),
            buffers,
            fused=_has_fused(values),
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr=rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        for held, buffer in zip(moments, buffers):
            if buffer is not None:
                held["momentum_buffer"] = buffer

    def keeps_moments(self, settings: Mapping[str, object]) -> bool:
        return settings.get("momentum", self.momentum) != 0


@dataclass(frozen=True)
class Lion(_Decaying):
    """Moves by the sign of a momentum, with one moment only (Chen et al. 2023): give a third to a tenth of AdamW's rate and
    three to ten times its weight decay.

    no_decay: what weight decay leaves alone, as in `AdamW`.

    Example:
        >>> Lion(lr=1e-4).betas
        (0.9, 0.99)
    """

    moments: ClassVar[tuple[str, ...]] = ("exp_avg",)

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    no_decay: NoDecay = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_betas(self.betas)

    def update(
        self,
        values: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        moments: Sequence[Moments],
        rate: float,
        updates: int,
    ) -> None:
        _start(self.moments, values, moments)
        for value, gradient, held in zip(values, gradients, moments):
            average = held["exp_avg"]
            direction = average.mul(self.betas[0]).add_(gradient, alpha=1 - self.betas[0]).sign_()
            value.mul_(1 - rate * self.weight_decay).add_(direction, alpha=-rate)
            average.mul_(self.betas[1]).add_(gradient, alpha=1 - self.betas[1])


def _start(names: Sequence[str], values: Sequence[torch.Tensor], moments: Sequence[Moments]) -> None:
    """Add moments of zeros where there are none yet."""
    for value, held in zip(values, moments):
        for key in names:
            if key not in held:
                held[key] = torch.zeros_like(value, memory_format=torch.preserve_format)


def _has_fused(values: Sequence[torch.Tensor]) -> bool:
    """Whether torch has fused kernels for these tensors."""
    return all(value.device.type in ("cpu", "cuda") and value.is_floating_point() for value in values)


def _check_betas(betas: tuple[float, float]) -> None:
    if not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        raise InputError(f"betas={betas}: give two numbers of 0 or more that are less than 1")


def _check_no_decay(no_decay: object) -> None:
    if isinstance(no_decay, bool):
        return
    if not (isinstance(no_decay, tuple) and no_decay and all(isinstance(item, str) for item in no_decay)):
        raise InputError(
            f"no_decay={no_decay!r}: give True (norms, biases and embeddings), False, or a tuple of globs of names"
        )
