"""Indices are in range before a kernel reads with them: on a CUDA device one that is not ends the whole process's device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from bmgraph.ops.trait_row import Dims, Lookup
from bmgraph.ops.traits import row_of
from bmgraph.utils.torch_internals import FakeTensor, TorchDispatchMode

IGNORED = -100
"""The label that a loss over classes leaves out if its call does not say which."""


def checked_indices(device: torch.device | str) -> AbstractContextManager[object]:
    """Where calls raise IndexError on `device` for an index out of range, as they do on the CPU, before a kernel runs.

    On a CUDA device such a kernel would make every later call of the process fail. Each lookup then waits for the device,
    so this is for what is tried, not for what is repeated.
    """
    return IndexBounds() if torch.device(device).type == "cuda" else nullcontext()  # type: ignore[no-untyped-call]


class IndexBounds(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises IndexError where an operator would read, write or count with an index out of range."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for indices, low, high, left_out in _indices(func, args):
            _check(func, indices, low, high, left_out)
        return func(*args, **(kwargs or {}))


def _indices(func: Any, args: Sequence[Any]) -> Iterator[tuple[torch.Tensor, int, int, int | None]]:
    """The indices of a call, their lowest and highest values, and one beside these."""
    row = row_of(func)
    if row.dims is Dims.CLASS_LOSS:
        scores, labels = args[:2]
        left_out = args[4] if len(args) > 4 and isinstance(args[4], int) else IGNORED
        if not labels.is_floating_point():
            yield labels, 0, scores.shape[min(1, scores.dim() - 1)] - 1, left_out
    elif row.lookup is Lookup.ROWS:
        yield args[1], 0, _last(args[0], 0), None
    elif row.lookup in (Lookup.AXIS, Lookup.WRITTEN_AXIS):
        yield args[2], 0, _last(args[0], args[1]), None
    elif row.lookup is Lookup.EXPERTS:
        yield args[2], 0, _last(args[1], 0), None
    elif row.lookup is Lookup.LIST:
        axis = 0
        for indices in args[1]:
            if indices is not None and indices.dtype in (torch.bool, torch.uint8):
                axis += indices.dim()
                continue
            if indices is not None:
                yield indices, -_last(args[0], axis) - 1, _last(args[0], axis), None
            axis += 1


def _last(table: torch.Tensor, axis: int) -> int:
    return table.shape[axis] - 1 if table.dim() else 0


def _check(func: Any, indices: torch.Tensor, low: int, high: int, left_out: int | None) -> None:
    if isinstance(indices, FakeTensor) or indices.is_meta:
        return
    if left_out is not None:
        indices = indices[indices != left_out]
    if not indices.numel():
        return
    found = [int(value) for value in indices.aminmax()]
    if found[0] < low or found[1] > high:
        raise IndexError(f"{func}: indices from {found[0]} to {found[1]}, but only {low} to {high} are there")
