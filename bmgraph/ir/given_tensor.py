"""What a caller gives for an input, as a plain tensor that holds its values."""

from __future__ import annotations

import numpy as np
import torch

from bmgraph.errors import InputError
from bmgraph.utils.torch_internals import FakeTensor

NUMBER_KINDS = "biufc"
"""numpy's kinds of booleans, integers, floats and complex numbers."""


def as_tensor(what: str, value: object, expected: str) -> torch.Tensor:
    """A tensor or numpy array as a tensor; `what` names it in errors, and `expected` says what belongs there.

    Raises InputError for anything else, and where values are not laid out one by one in memory (sparse, nested, quantized,
    masked, objects, foreign byte order) or there are none (meta and fake tensors, freed memory).
    """
    if isinstance(value, np.ndarray):
        return _from_numpy(what, value, expected)
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{what} is a {type(value).__name__}: expected a tensor {expected}")
    if value.is_nested:
        raise InputError(f"{what} is a nested tensor: give a padded one, as .to_padded_tensor(0) makes it")
    if value.layout != torch.strided:
        layout = str(value.layout).removeprefix("torch.").lstrip("_")
        raise InputError(f"{what} has layout {layout}: give a dense tensor, as .to_dense() makes it")
    if value.is_quantized:
        raise InputError(f"{what} is a quantized tensor: give its values, as .dequantize() makes them")
    if _has_no_values(value):
        raise InputError(
            f"{what} has no values (it is on the meta device, fake, or freed): give a tensor that has"
        )
    return value


def _has_no_values(value: torch.Tensor) -> bool:
    if value.device.type == "meta" or isinstance(value, FakeTensor):
        return True
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return False  # a subclass may keep its values elsewhere
    end = value.storage_offset() + sum(
        (size - 1) * stride for size, stride in zip(value.shape, value.stride())
    )
    return value.numel() > 0 and (end + 1) * value.element_size() > value.untyped_storage().nbytes()


def _from_numpy(what: str, value: np.ndarray, expected: str) -> torch.Tensor:
    if isinstance(value, np.ma.MaskedArray):
        raise InputError(
            f"{what} is a masked array, whose masked values would be read: fill them, as .filled(0) does"
        )
    if not value.dtype.isnative:
        raise InputError(
            f"{what} has dtype {value.dtype.str}, whose bytes are in another order than this machine's: convert it with "
            ".astype(value.dtype.newbyteorder('='))"
        )
    if value.dtype.kind in NUMBER_KINDS:
        try:
            return torch.from_numpy(np.require(value, requirements=("C", "W")))
        except TypeError:
            pass  # numbers that torch does not have, such as long doubles
    raise InputError(f"{what} is an array of {value.dtype}: expected numbers, {expected}")
