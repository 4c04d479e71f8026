"""Routers: small networks that predict which experts contribute most to a token, or centroids that need no training."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from bmgraph.passes.moefy.expert_weights import gather_groups

MIN_EPOCHS = 30
MIN_STEPS = 500
BATCH_SIZE = 256
LEARNING_RATE = 3e-3
HIDDEN_PER_EXPERT = 4
"""Hidden units for each expert."""
MASS_STEPS, MASS_HIDDEN = 1500, 8
"""The same for masses: with those above a router of 32 experts captured 4 points less of them than with these."""
HELD_OUT = 10
"""One row in this many is not trained on, but used to measure the router."""
MIN_TOKENS = 2 * HELD_OUT
"""The fewest calibration tokens that a router is trained on."""

TRAINED, SIMILARITY, ORACLE, UNTRAINED = "trained", "similarity", "oracle", "random"
ROUTERS = (TRAINED, SIMILARITY, ORACLE, UNTRAINED)

ALWAYS = 1e4
"""The score of an expert that every token takes; scores of others are norms, or masses, over their deviation."""


RouterTensors = tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]
"""The weight, the bias and the hidden layer of a router."""


@dataclass(frozen=True)
class Router:
    """scores f[T, E] = weight @ h + bias; weight f[E, H], bias f[E].

    h is relu(hidden[0] @ x + hidden[1]) where there is a hidden layer, f[H, D] and f[H], else x.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    hidden: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x f[T, D] -> scores f[T, E]."""
        linear = nn.functional.linear
        return linear(torch.relu(linear(x, *self.hidden)) if self.hidden else x, self.weight, self.bias)

    @property
    def tensors(self) -> RouterTensors:
        """All of it, for `of_tensors`."""
        return self.weight, self.bias, self.hidden

    @staticmethod
    def of_tensors(tensors: RouterTensors | None) -> Router | None:
        """The router of its tensors; None for none."""
        return None if tensors is None else Router(*tensors)

    def with_shared(self, count: int) -> Router:
        """The router of `count` more experts, in front of the others, which every token takes."""
        weight = torch.cat([self.weight.new_zeros(count, self.weight.shape[1]), self.weight])
        return Router(weight, torch.cat([self.bias.new_full((count,), ALWAYS), self.bias]), self.hidden)


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
    return _fold_scaling(_random_router(x, experts, seed, HIDDEN_PER_EXPERT), x)


def centroid_router(rows: torch.Tensor, groups: torch.Tensor) -> Router:
    """The router that compares a token with the mean direction of an expert's first weights, without training.

    rows f[N, D]: the first weights of neurons, the gate's where there is one; groups i64[E, S]. Source: the similarity routers
    of Zhang et al. 2022 (MoEfication).
    """
    directions = gather_groups(nn.functional.normalize(rows.float(), dim=1), groups, 0).sum(1)
    members = (groups >= 0).sum(1, keepdim=True).to(directions)
    return Router(directions / members, directions.new_zeros(len(groups)))


def train_router(
    x: torch.Tensor, scores: torch.Tensor, seed: int, steps: int = MIN_STEPS, hidden: int = HIDDEN_PER_EXPERT
) -> Router:
    """Train a router to predict scores f[N, E], up to their scale, from x f[N, D], in at least so many steps, with so many hidden
    units for each expert.

    Regression with mean squared error; for the norms of experts' outputs after Szatkowski et al. 2024 (D2DMoE).
    Deterministic on one machine with one number of threads.
    """
    initial = _random_router(x, scores.shape[1], seed, hidden)
    assert initial.hidden is not None
    weights = [nn.Parameter(item) for item in (*initial.hidden, initial.weight, initial.bias)]
    mean, deviation = _scaling(x)
    inputs, targets = (x - mean) / deviation, scores / scores.std(correction=0).clamp(min=1e-12)
    batches = -(-len(x) // BATCH_SIZE)
    epochs = max(MIN_EPOCHS, -(-steps // batches))
    optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.randperm(len(x), generator=generator).to(x.device)
            for start in range(0, len(x), BATCH_SIZE):
                rows = order[start : start + BATCH_SIZE]
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(_of(weights)(inputs[rows]), targets[rows])
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
                optimizer.step()
                schedule.step()
    return _fold_scaling(_of([item.detach() for item in weights]), x)


def _of(weights: list[torch.Tensor] | list[nn.Parameter]) -> Router:
    """A router of the weight and bias of its hidden layer, then of its last one."""
    first, first_bias, weight, bias = weights
    return Router(weight, bias, (first, first_bias))


def _random_router(x: torch.Tensor, experts: int, seed: int, hidden: int) -> Router:
    """Random weights for inputs with mean 0 and variance 1."""
    width = hidden * experts
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(width, x.shape[1], generator=generator) / x.shape[1] ** 0.5
    second = torch.randn(experts, width, generator=generator) / width**0.5
    return Router(second.to(x), x.new_zeros(experts), (first.to(x), x.new_zeros(width)))


def _scaling(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each input feature."""
    return x.mean(0), x.std(0, correction=0).clamp(min=1e-6)


def _fold_scaling(router: Router, x: torch.Tensor) -> Router:
    """Fold the standardization of inputs into a router that expects mean 0 and variance 1."""
    assert router.hidden is not None
    mean, deviation = _scaling(x)
    first = router.hidden[0] / deviation
    return Router(router.weight, router.bias, (first, router.hidden[1] - first @ mean))


def retained_share(scores: torch.Tensor, predicted: torch.Tensor, active: int) -> float:
    """The share of the scores f[N, E] in the `active` experts with the highest predicted scores f[N, E]."""
    chosen = predicted.topk(active, dim=1).indices
    return float(scores.double().gather(1, chosen).sum() / scores.double().sum().clamp(min=1e-30))


def mean_above(predicted: torch.Tensor, active: int, threshold: float, shared: int) -> float:
    """How many of its `active` experts a token keeps, on average: those of at least `threshold` times the best score f[N, E]
    beyond the first `shared` ones."""
    scores = predicted.topk(active, dim=1).values
    best = scores[:, shared : shared + 1]
    return float((scores >= best - best.abs() * (1 - threshold)).double().sum(1).mean())


def held_out(x: torch.Tensor) -> torch.Tensor:
    """bool[N]: which rows of a sample are not trained on."""
    return torch.arange(len(x), device=x.device) % HELD_OUT == 0
