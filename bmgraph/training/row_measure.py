"""RowMeasure: what an evaluation measures beside the loss, as sums over rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch


class RowMeasure(Protocol):
    """Sums over the rows of a batch, which add up over batches and ranks, and the figures that follow from them.

    `names`: the figures that `figures` gives, of each of which more is better.
    """

    names: tuple[str, ...]

    def __call__(self, outputs: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The model's outputs and inputs by name -> sums over their rows f[K], in torch's operators."""

    def figures(self, sums: torch.Tensor) -> Mapping[str, float]:
        """Sums over all rows f64[K] -> figures by name."""
