"""Categorical inputs: integers that a caller may give by name, such as the delta of each row of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from bmgraph.errors import InputError
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.utils.did_you_mean import did_you_mean


def indices_of(spec: TensorSpec, value: object, sizes: Mapping[str, int]) -> object:
    """The indices of names as a tensor: 1 for the first name in `spec.names`, 0 for None; "" stands for an index that is free.

    A single name, or None, applies to all rows; `sizes` gives the dynamic sizes known so far. A value that is not a
    name or a list of names is returned unchanged. Raises InputError for an unknown name.
    """
    if value is None or isinstance(value, str):
        value = [value] * _row_count(spec, sizes)
    if not isinstance(value, (list, tuple)):
        return value
    indices = []
    for item in value:
        if item is not None and (not item or item not in spec.names):
            known = [name for name in spec.names if name]
            hint = did_you_mean(item, known)
            raise InputError(
                f"input {spec.name!r} names {item!r}{hint} (names: {', '.join(known)}, or None for none)"
            )
        indices.append(0 if item is None else spec.names.index(item) + 1)
    return torch.tensor(indices, dtype=spec.dtype)


def check_indices(spec: TensorSpec, value: torch.Tensor) -> None:
    """Raise InputError for an index that is out of range."""
    if spec.names and not bool(((value >= 0) & (value <= len(spec.names))).all()):
        raise InputError(f"input {spec.name!r} holds indices outside 0 to {len(spec.names)}: {spec}")


def check_values(spec: TensorSpec, value: torch.Tensor) -> None:
    """Raise InputError, with its place, for a value that is not in the tables that it is looked up in (`spec.values`).

    Engines wrap such a value or take zeros for it, without a word.
    """
    if spec.values is None or not value.numel():
        return
    low, high = spec.values
    least, most = (int(item) for item in torch.aminmax(value))
    if least >= low and (high is None or most <= high):
        return
    found = least if least < low else most
    place = (value == found).nonzero()[0].tolist()
    known = f"at least {low}" if high is None else f"{low} to {high}"
    raise InputError(
        f"input {spec.name!r} holds {found} at {place}: this model looks its values up in a table that has {known}"
    )


def fill_categorical(
    inputs: Sequence[TensorSpec], batch: Mapping[str, torch.Tensor], start: int = 0
) -> dict[str, torch.Tensor]:
    """The batch with missing categorical inputs filled in: row i gets the index (start + i) modulo their number.

    Calibration and verification thus see every value that callers may give. Other missing inputs stay missing.
    """
    filled = {spec.name: batch[spec.name] for spec in inputs if spec.name in batch}
    sizes = {
        dim: size
        for spec in inputs
        if spec.name in filled
        for dim, size in zip(spec.shape, filled[spec.name].shape)
        if isinstance(dim, str)
    }
    for spec in inputs:
        if (
            spec.names
            and spec.name not in filled
            and (isinstance(spec.shape[0], int) or spec.shape[0] in sizes)
        ):
            counter = torch.arange(start, start + _row_count(spec, sizes), dtype=spec.dtype)
            filled[spec.name] = counter % (len(spec.names) + 1)
    return filled


def _row_count(spec: TensorSpec, sizes: Mapping[str, int]) -> int:
    rows = spec.shape[0]
    if isinstance(rows, str) and rows not in sizes:
        raise InputError(f"missing input {spec.name!r}: expected {spec}")
    return rows if isinstance(rows, int) else sizes[rows]
