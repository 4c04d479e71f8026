"""Bounds what a configuration may have transformers make, by the weights that its folder or file holds.

A configuration is small, and may ask for any size: every tensor of that size would be made, and filled with random numbers,
before it turned out that the folder does not hold it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bmgraph.errors import InputError

_COUNT = re.compile(r"layer|block|stage|depth|expert|head|label")
"""Fields that say how many parts there are: a part has weights, or rows of weights."""
_COUNTS_ALWAYS = 10_000
_SPARE_ELEMENTS, _SPARE_TENSORS = 50 * 2**20, 5_000
_MORE_ELEMENTS, _MORE_TENSORS = 4, 20
"""How many times the stored elements and tensors may be made: buffers, masks and values of initialisation come on top."""


class Sayer(NamedTuple):
    """How a message calls what describes a model and what holds its weights, and what it advises."""

    says: str
    holder: str
    advice: str

    @staticmethod
    def of_folder(folder: Path) -> Sayer:
        """The configuration of a folder."""
        return Sayer(f"{folder}/config.json", "the folder", "take weights and config.json of one model")


def check_counts(sayer: Sayer, config: Mapping[str, Any], largest: int) -> None:
    """Raise InputError for a count of parts beyond `largest`, the largest number of tensors or rows that are held."""
    for name, value in _fields(config):
        if type(value) is int and value > max(largest, _COUNTS_ALWAYS) and _COUNT.search(name):
            raise InputError(
                f"{sayer.says} says {name}={value}, but {sayer.holder} holds no weights for as many: {sayer.advice}"
            )


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a configuration and of its parts, but for the names of labels, which are the user's."""
    items = value.items() if isinstance(value, Mapping) else [(name, item) for item in value]
    for key, item in items:
        if key in ("id2label", "label2id"):
            continue
        if isinstance(item, (Mapping, list)):
            yield from _fields(item, str(key))
        else:
            yield str(key), item


class BoundedSizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on, tensors can be made up to a few times of what a folder holds; raises InputError beyond that."""

    def __init__(self, sayer: Sayer, elements: int, tensors: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sayer = sayer
        self._elements = _MORE_ELEMENTS * elements + _SPARE_ELEMENTS
        self._tensors = _MORE_TENSORS * tensors + _SPARE_TENSORS

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and count what it makes of numbers alone."""
        if not any(isinstance(item, torch.Tensor) for item in args):
            self._count(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _count(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count what an operator would make, before it does."""
        made = func(*args, **{**kwargs, "device": torch.device("meta")}) if "device" in kwargs else None
        if isinstance(made, torch.Tensor):
            self._elements -= made.numel()
            self._tensors -= 1
        if self._elements < 0 or self._tensors < 0:
            raise InputError(
                f"{self._sayer.says} describes a model that is larger than the weights that {self._sayer.holder} holds: "
                f"{self._sayer.advice}"
            )
