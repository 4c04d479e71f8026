"""How parameters are moved: frozen configurations over torch.optim, for any tensors, whole or pieces of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from bmgraph.errors import InputError


@dataclass(frozen=True)
class Optimizer(ABC):
    """An elementwise rule: what it does to a number depends on that number's own gradients alone, so a piece of a
    parameter is trained as the whole would be."""

    moments: ClassVar[tuple[str, ...]] = ()
    """The names that torch.optim gives to what it remembers of each number."""

    lr: float

    def __post_init__(self) -> None:
        if not self.lr >= 0:
            raise InputError(f"lr={self.lr}: give a number of 0 or more")

    @abstractmethod
    def over(self, tensors: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        """The optimizer of torch.optim for these tensors, which it changes in place."""

    def remembered(self, steps: int, moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What torch.optim keeps of one tensor after that many steps."""
        return moments


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    Example:
        >>> AdamW(lr=1e-4).weight_decay
        0.01
    """

    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2

    def over(self, tensors: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            list(tensors), lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )

    def remembered(self, steps: int, moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"step": torch.tensor(float(steps)), **moments} if moments else {}


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent, with momentum where it is not 0."""

    moments: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    lr: float = 1e-2
    momentum: float = 0.0
    weight_decay: float = 0.0

    def over(self, tensors: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            list(tensors), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
