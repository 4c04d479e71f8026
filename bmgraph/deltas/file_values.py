"""Checks the values of tensors that a folder of deltas holds, before anything is computed with them."""

from __future__ import annotations

from pathlib import Path

import torch

from bmgraph.errors import BundleError
from bmgraph.utils.finite import is_finite

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types of the floating-point numbers of deltas and weights."""


def check_values(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raise BundleError for floating-point numbers of a type that is no weight's, or that are not finite."""
    if not tensor.is_floating_point():
        return
    if tensor.dtype not in DTYPES:
        raise BundleError(
            f"{path} holds {name} as {tensor.dtype}: expected one of {', '.join(map(str, DTYPES))}; convert it first"
        )
    if not is_finite(tensor):
        raise BundleError(f"{path}: {name} holds NaN or infinity")
