"""Hard concrete gates (Louizos et al. 2018, arXiv:1712.01312): random numbers from 0 to 1, of which many are just 0 or 1.

A gate is clamp(sigmoid((log alpha + noise) / TEMPERATURE) (HIGH - LOW) + LOW, 0, 1), with logistic noise while it trains. Its
deterministic value has none: that is its median, which is 0 just where the gate is closed at least half of the time, so that as many are
closed in the end as training expects. (The paper leaves the temperature out then; more gates would be open than it expects.)
"""

from __future__ import annotations

import math

import torch

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1

OPEN = 2.2
"""log alpha of a new gate: its deterministic value is 1, and it is open with probability 0.98."""

MOST = 6.0
"""log alpha is kept from -MOST to MOST (4.6 in the authors' code): a gate that is closed with probability 0.99 comes back."""

_SHIFT = TEMPERATURE * math.log(-LOW / HIGH)
_LEAST = 1e-6


def open_probability(log_alpha: torch.Tensor) -> torch.Tensor:
    """The probability that a gate is not 0."""
    return torch.sigmoid(log_alpha - _SHIFT)


def logistic_noise(sizes: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """log u - log(1 - u) for uniform u, f32."""
    uniform = torch.rand(sizes, generator=generator).clamp(_LEAST, 1 - _LEAST)
    return uniform.log() - (-uniform).log1p()
