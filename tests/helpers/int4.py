"""4-bit weights: to the nearest code, and as GPTQ assigns them."""

from __future__ import annotations

import torch

LARGEST = 7
"""The largest 4-bit code, around 0."""


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest codes i8[out, in] of a weight, and one scale f[out] for each output channel."""
    scale = weight.abs().amax(1) / LARGEST
    return (weight / scale[:, None]).round().to(torch.int8), scale


def compensated(weight: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ (Frantar et al. 2022, arXiv:2210.17323), column by column: what one column loses, the next ones make up for.

    `second` f[in, in] is X^T X of the inputs of the linear.
    """
    _, scale = rounded(weight)
    damped = second.double() + 0.01 * second.double().diagonal().mean() * torch.eye(
        len(second), dtype=torch.float64
    )
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, codes = weight.double().clone(), torch.zeros_like(weight, dtype=torch.int8)
    for column in range(weight.shape[1]):
        codes[:, column] = (left[:, column] / scale).round().clamp(-LARGEST, LARGEST).to(torch.int8)
        lost = (left[:, column] - codes[:, column] * scale) / upper[column, column]
        left[:, column:] -= lost[:, None] * upper[column, column:]
    return codes, scale
