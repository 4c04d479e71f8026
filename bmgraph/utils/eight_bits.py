"""Floating-point numbers of 8 bits, of which torch has few operators."""

from __future__ import annotations

import torch


def is_float8(dtype: torch.dtype) -> bool:
    """Whether a type is one of floating-point numbers of 8 bits."""
    return dtype.is_floating_point and dtype.itemsize == 1


def writable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or the same memory as integers where it holds floating-point numbers of 8 bits, whose parts torch does not write.

    Zeros are zeros in both.
    """
    return tensor.view(torch.uint8) if is_float8(tensor.dtype) else tensor
