"""How far a model in half precision is from itself in fp32: the measure of what its program may differ by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from bmgraph.verify.metrics import relative_error

HALF = (torch.bfloat16, torch.float16)

MOST = 0.25
"""Largest relative error that is allowed for rounding; beyond it a comparison says nothing."""


def half_dtype(model: nn.Module, tensors: Mapping[str, torch.Tensor] | None = None) -> torch.dtype | None:
    """The half-precision dtype of a model's weights, buffers or inputs; None if there is none."""
    found = {tensor.dtype for tensor in (*model.parameters(), *model.buffers(), *(tensors or {}).values())}
    return next((dtype for dtype in HALF if dtype in found), None)


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """Give the model's half-precision parameters and buffers fp32 copies of their values inside of the block.

    The tensors stay the same objects, and have their own storage, dtype and `.grad` again after the block.
    """
    halves = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype in HALF]
    kept = [(tensor.data, tensor.grad) for tensor in halves]
    try:
        for tensor in halves:
            tensor.grad = None  # torch takes no gradient of another dtype than its tensor's
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, (data, gradient) in zip(halves, kept):
            tensor.grad = None
            tensor.data = data
            tensor.grad = gradient


def widened(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, with those of half precision in fp32."""
    return {name: value.float() if value.dtype in HALF else value for name, value in tensors.items()}


def rounding_bounds(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    expected: Sequence[torch.Tensor],
    run: Callable[[Mapping[str, torch.Tensor]], Sequence[torch.Tensor]],
    tolerance: float,
) -> list[float]:
    """For each output in `expected`, the relative error that a program may have against it.

    That is `tolerance`; for a model in half precision it is increased by twice the error that `expected` has against
    the same model in fp32, or by two units in the last place where this is more: two ways to round the same
    computation differ by about that. `run` runs the model on inputs and returns its output tensors.
    """
    dtype = half_dtype(model, tensors)
    if dtype is None:
        return [tolerance] * len(expected)
    least = torch.finfo(dtype).eps
    try:
        with in_fp32(model):
            exact: Sequence[torch.Tensor] = run(widened(tensors))
    except RuntimeError:  # forward casts to its own dtype: only the dtype says how far it rounds
        exact = expected
    if len(exact) != len(expected):
        exact = expected
    return [
        min(MOST, tolerance + 2 * max(least, relative_error(found, reference)))
        for found, reference in zip(expected, exact)
    ]
