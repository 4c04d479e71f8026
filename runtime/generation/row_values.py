"""Inputs with one value per prompt, such as the choice of a delta: what callers may give, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bmgraph.errors import InputError
from bmgraph.ir.categorical_input import check_indices, check_values, indices_of
from bmgraph.ir.given_tensor import as_tensor
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.runtime.generation.sampling import Array


def row_values(spec: TensorSpec, value: Any, rows: int) -> Array:
    """An input's values, one per prompt; names of a categorical input become numbers, a missing value 0."""
    if spec.names:
        value = indices_of(spec, value, {str(spec.shape[0]): rows})
    elif value is None:
        raise InputError(f"missing input {spec.name!r}: expected {spec}")
    tensor = _tensor_of_rows(spec, value)
    if tensor.shape[:1] != (rows,):
        found = f"has {len(tensor)} values" if tensor.dim() else "is one value"
        raise InputError(f"input {spec.name!r} {found}: give one for each of the {rows} prompts")
    if tensor.dtype.is_complex or (tensor.dtype.is_floating_point and not spec.dtype.is_floating_point):
        raise InputError(f"input {spec.name!r} has dtype {tensor.dtype}: expected {spec}")
    tensor = tensor.to(spec.dtype)
    check_indices(spec, tensor)
    check_values(spec, tensor)
    values: Array = tensor.detach().cpu().numpy()
    return values


def _tensor_of_rows(spec: TensorSpec, value: Any) -> torch.Tensor:
    what = f"input {spec.name!r}"
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return as_tensor(what, value, str(spec))
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(
            f"{what} is a {type(value).__name__} that is no list of numbers: give one for each prompt, {spec}"
        ) from error


def no_values(specs: Sequence[TensorSpec], rows: int) -> dict[str, Array]:
    """Zeros for those inputs that have one value per row."""
    return {
        spec.name: torch.zeros(
            rows, *(dim for dim in spec.shape[1:] if isinstance(dim, int)), dtype=spec.dtype
        ).numpy()
        for spec in specs
        if all(isinstance(dim, int) for dim in spec.shape[1:])
    }
