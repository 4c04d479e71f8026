"""What weights are compared by."""

from __future__ import annotations

from collections.abc import Callable

import torch

MAGNITUDE, WANDA, SPARSEGPT = "magnitude", "wanda", "sparsegpt"

SCORES = (MAGNITUDE, WANDA, SPARSEGPT)
"""The absolute value; that times the norm (L2) of its input over calibration data (Sun et al. 2023, arXiv:2306.11695); what dropping it
costs after the other weights have made up for it, which they then do (Frantar and Alistarh 2023, arXiv:2301.00774)."""

Score = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(weight [out, in], squares of its inputs [in]) -> the importance of each element [out, in]."""


def magnitude(weight: torch.Tensor, squares: torch.Tensor | None) -> torch.Tensor:
    """The absolute values."""
    return weight.abs()


def wanda(weight: torch.Tensor, squares: torch.Tensor | None) -> torch.Tensor:
    """The absolute values times the norms of the inputs."""
    assert squares is not None
    return weight.abs() * squares.sqrt().to(weight.dtype)


FUNCTIONS: dict[str, Score] = {MAGNITUDE: magnitude, WANDA: wanda}
