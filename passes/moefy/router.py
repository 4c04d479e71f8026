"""Routers: small networks that predict which experts contribute most to a token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

MIN_EPOCHS = 30
MIN_STEPS = 500
BATCH_SIZE = 256
LEARNING_RATE = 3e-3
HIDDEN_PER_EXPERT = 4
"""Hidden units for each expert."""
HELD_OUT = 10
"""One row in this many is not trained on, but used to measure the router."""


@dataclass(frozen=True)
class Router:
    """scores f[T, E] = second @ relu(first @ x + first_bias) + second_bias; first f[H, D], second f[E, H]."""

    first: torch.Tensor
    first_bias: torch.Tensor
    second: torch.Tensor
    second_bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x f[T, D] -> scores f[T, E]."""
        hidden = torch.relu(nn.functional.linear(x, self.first, self.first_bias))
        return nn.functional.linear(hidden, self.second, self.second_bias)


@dataclass
class Sample:
    """An evenly spaced sample of at most `limit` rows of a stream; when full, it drops every second row."""

    limit: int
    x: list[torch.Tensor] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    _stride: int = 1
    _seen: int = 0

    def add(self, x: torch.Tensor, scores: torch.Tensor) -> None:
        """Offer rows x f[T, D] with the scores f[T, E] of their experts."""
        first = -self._seen % self._stride
        self._seen += len(x)
        self.x.append(x[first :: self._stride].clone())
        self.scores.append(scores[first :: self._stride].clone())
        while sum(map(len, self.x)) > self.limit:
            x, scores = self.rows()
            self.x, self.scores = [x[::2].clone()], [scores[::2].clone()]
            self._stride *= 2

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of the sample: x f[N, D], scores f[N, E]."""
        return torch.cat(self.x), torch.cat(self.scores)


def untrained_router(x: torch.Tensor, experts: int, seed: int) -> Router:
    """A router with random weights, scaled to inputs like x f[N, D]."""
    return _fold_scaling(_random_router(x, experts, seed), x)


def train_router(x: torch.Tensor, scores: torch.Tensor, seed: int) -> Router:
    """Train a router to predict scores f[N, E], up to their scale, from x f[N, D].

    The scores are the norms of the experts' outputs; regression with mean squared error, after Szatkowski et al. 2024
    (D2DMoE). Deterministic on one machine with one number of threads.
    """
    initial = _random_router(x, scores.shape[1], seed)
    weights = [
        nn.Parameter(item)
        for item in (initial.first, initial.first_bias, initial.second, initial.second_bias)
    ]
    mean, deviation = _scaling(x)
    inputs, targets = (x - mean) / deviation, scores / scores.std(correction=0).clamp(min=1e-12)
    batches = -(-len(x) // BATCH_SIZE)
    epochs = max(MIN_EPOCHS, -(-MIN_STEPS // batches))
    optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.randperm(len(x), generator=generator).to(x.device)
            for start in range(0, len(x), BATCH_SIZE):
                rows = order[start : start + BATCH_SIZE]
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(Router(*weights)(inputs[rows]), targets[rows])
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
                optimizer.step()
                schedule.step()
    return _fold_scaling(Router(*(item.detach() for item in weights)), x)


def _random_router(x: torch.Tensor, experts: int, seed: int) -> Router:
    """Random weights for inputs with mean 0 and variance 1."""
    width = HIDDEN_PER_EXPERT * experts
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(width, x.shape[1], generator=generator) / x.shape[1] ** 0.5
    second = torch.randn(experts, width, generator=generator) / width**0.5
    return Router(first.to(x), x.new_zeros(width), second.to(x), x.new_zeros(experts))


def _scaling(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each input feature."""
    return x.mean(0), x.std(0, correction=0).clamp(min=1e-6)


def _fold_scaling(router: Router, x: torch.Tensor) -> Router:
    """Fold the standardization of inputs into a router that expects mean 0 and variance 1."""
    mean, deviation = _scaling(x)
    first = router.first / deviation
    return Router(first, router.first_bias - first @ mean, router.second, router.second_bias)


def retained_share(scores: torch.Tensor, predicted: torch.Tensor, active: int) -> float:
    """The share of the squared scores f[N, E] in the `active` experts with the highest predicted scores f[N, E]."""
    chosen = predicted.topk(active, dim=1).indices
    squared = scores.double().square()
    return float(squared.gather(1, chosen).sum() / squared.sum().clamp(min=1e-30))
