"""Optimizer configurations, for whole tensors or shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from bmgraph.errors import InputError


@dataclass(frozen=True)
class Optimizer(ABC):
    """The configuration of an elementwise optimizer of torch.optim.

    Elementwise: the update of an element depends on its own gradients alone, so that a shard of a parameter is updated
    as the whole parameter would be. Raises InputError if `lr` is negative or NaN.
    """

    moments: ClassVar[tuple[str, ...]] = ()
    """torch.optim's names of its elementwise state."""
    squares: ClassVar[tuple[str, ...]] = ()
    """Those of its moments that are never negative."""

    lr: float

    def __post_init__(self) -> None:
        if not self.lr >= 0:
            raise InputError(f"lr={self.lr}: give a number of 0 or more")

    @abstractmethod
    def build(self, tensors: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        """The torch.optim optimizer of these tensors, which it updates in place."""

    def torch_state(self, steps: int, moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """torch.optim's state of one tensor after `steps` steps, from its `moments` by name."""
        return moments

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

    def build(self, tensors: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            list(tensors), lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )

    def torch_state(self, steps: int, moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"step": torch.tensor(float(steps)), **moments} if moments else {}


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

    def build(self, tensors: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            list(tensors), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )

    def keeps_moments(self, settings: Mapping[str, object]) -> bool:
        return settings.get("momentum", self.momentum) != 0
