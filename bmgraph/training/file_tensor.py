"""Tensors in memory-mapped files without names, which the system frees with the process, however that ends."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from math import prod

import torch

from bmgraph.errors import InputError
from bmgraph.training.placement import Place
from bmgraph.utils.torch_internals import FakeTensor


def zeros_at(place: Place, like: torch.Tensor) -> torch.Tensor:
    """A tensor of zeros in a place, with data if `like` has data; raises InputError if its file has no room."""
    if isinstance(like, FakeTensor) or not place.folder:
        return like.new_zeros(place.shape, dtype=place.dtype, device=place.device)
    return _mapped(place)


def _mapped(place: Place) -> torch.Tensor:
    size = prod(place.shape) * place.dtype.itemsize
    if not size:
        return torch.zeros(place.shape, dtype=place.dtype)
    try:
        with tempfile.TemporaryFile(dir=place.folder, prefix="bmgraph-state-") as file:
            # room is taken now: a page without room would end the process when it is written
            if sys.platform == "linux":
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            mapped = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise InputError(
            f"no file of {size} bytes for optimizer state in {place.folder}: {error.strerror}"
        ) from error
    return torch.frombuffer(mapped, dtype=place.dtype).view(place.shape)
