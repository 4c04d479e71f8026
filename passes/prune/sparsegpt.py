"""SparseGPT: weights that are dropped one column after the other, each of which the columns behind make up for."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bmgraph.pass_manager.layer_sites import inverse_root

BLOCK = 128
"""Columns that are chosen together where no pattern says so, and whose effect on the rest is applied at once."""

Choose = Callable[[torch.Tensor], torch.Tensor]
"""Scores f[out, columns] of some columns -> bool[out, columns], true for the weights that are kept."""


def sparsegpt(
    weight: torch.Tensor, second: torch.Tensor, choose: Choose, columns: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept weights f[out, in], changed so that X w^T moves least, and the mask bool[out, in].

    weight: f[out, in]. second: f[in, in], X^T X over the inputs x f[in] of the product. choose: which of `columns` consecutive
    columns are kept, by what dropping each would cost. Inputs that are always zero lose their weights.

    Source: Frantar and Alistarh 2023 (arXiv:2301.00774), with the inverse by Cholesky in float64.
    """
    left, dead = weight.double().clone(), second.diagonal() == 0
    left[:, dead] = 0
    upper = inverse_root(second.double() + torch.diag(dead.double()))
    mask = torch.zeros_like(left, dtype=torch.bool)
    block = max(BLOCK // columns, 1) * columns
    for first in range(0, left.shape[1], block):
        last = min(first + block, left.shape[1])
        lost = torch.zeros_like(left[:, first:last])
        for column in range(first, last):
            if (column - first) % columns == 0:
                chosen = slice(column, min(column + columns, last))
                mask[:, chosen] = choose((left[:, chosen] / upper.diagonal()[chosen]).square())
            place = column - first
            dropped = torch.where(mask[:, column], 0.0, left[:, column])
            lost[:, place] = dropped / upper[column, column]
            left[:, column:last] -= lost[:, place, None] * upper[column, column:last]
        left[:, last:] -= lost @ upper[first:last, last:]
    return (left * mask).to(weight.dtype), mask
