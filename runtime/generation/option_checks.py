"""Checks that options of generation are the numbers that they should be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from bmgraph.errors import InputError
from bmgraph.ir.given_tensor import as_tensor

LONGEST = 60
"""How much of a value an error shows."""


def whole_number(name: str, value: object) -> int:
    """The value as an int; raises InputError, naming the option, for one that would be cut to a whole number, or is none."""
    item = _item(name, value)
    if not isinstance(item, int) or isinstance(item, bool):
        raise InputError(f"{name}={shown(value)}: give a whole number")
    return item


def real_number(name: str, value: object) -> float:
    """The value as a float, which may be infinite or NaN; raises InputError, naming the option, if it is no number."""
    item = _item(name, value)
    if not isinstance(item, (int, float)) or isinstance(item, bool):
        raise InputError(f"{name}={shown(value)}: give a number")
    try:
        return float(item)
    except OverflowError:
        return math.inf if item > 0 else -math.inf


def shown(value: object) -> str:
    """A value in a message: one short line, also for tensors and numbers of thousands of digits."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no such number
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _item(name: str, value: object) -> Any:
    """A number of Python in the place of one of numpy or torch; anything else as it is."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        found = as_tensor(name, value, "one number")
        return found.item() if found.dim() == 0 else value
    return value.item() if isinstance(value, np.generic) else value
