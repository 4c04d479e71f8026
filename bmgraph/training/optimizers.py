"""Optimizer configurations, for whole tensors or shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from bmgraph.errors import InputError

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

    def keeps_moments(self, settings: Mapping[str, object]) -> bool:
        """Whether an optimizer of this kind holds its moments once it has made a step; `settings` are its fields by name."""
        return bool(self.moments)


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)):
            raise InputError(f"betas={self.betas}: give two numbers of 0 or more that are less than 1")

    def update(
        self,
        values: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        moments: Sequence[Moments],
        rate: float,
        updates: int,
    ) -> None:
        for value, held in zip(values, moments):
            for key in self.moments:
                if key not in held:
                    held[key] = torch.zeros_like(value, memory_format=torch.preserve_format)
        first, second = ([held[key] for held in moments] for key in self.moments)
        adamw(
            list(values),
            list(gradients),
            first,
            second,
            [],
            [torch.tensor(float(updates - 1)) for _ in values],
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=rate,
            weight_decay=self.weight_decay,
            eps=self.eps,
            maximize=False,
        )


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent, with momentum if it is not 0.

    Example:
        >>> SGD(lr=0.1, momentum=0.9).momentum
        0.9
    """

    moments: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    lr: float = 1e-2
    momentum: float = 0.0
    weight_decay: float = 0.0

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
