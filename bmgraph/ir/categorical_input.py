"""Inputs of named choices: integers that a caller gives by name, such as the delta that each row of a batch takes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import torch

from bmgraph.errors import InputError
from bmgraph.ir.tensor_spec import TensorSpec


def numbers_of(spec: TensorSpec, value: object, sizes: Mapping[str, int]) -> object:
    """The numbers that names stand for: the place of a name from 1 on, 0 for None; one name, or none, stands for all rows.

    What is no name is given back as it is. Raises InputError for an unknown name.
    """
    if value is None or isinstance(value, str):
        value = [value] * _rows(spec, sizes)
    if not isinstance(value, (list, tuple)):
        return value
    numbers = []
    for item in value:
        if item is not None and item not in spec.names:
            close = difflib.get_close_matches(str(item), spec.names, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(
                f"input {spec.name!r} names {item!r}{hint} (names: {', '.join(spec.names)}, or None for none)"
            )
        numbers.append(0 if item is None else spec.names.index(item) + 1)
    return torch.tensor(numbers, dtype=spec.dtype)


def check_numbers(spec: TensorSpec, value: torch.Tensor) -> None:
    """Raise InputError where a number stands for no name."""
    if spec.names and not bool(((value >= 0) & (value <= len(spec.names))).all()):
        raise InputError(f"input {spec.name!r} holds numbers outside of 0 to {len(spec.names)}: {spec}")


def every_name(
    inputs: Sequence[TensorSpec], batch: Mapping[str, torch.Tensor], start: int = 0
) -> dict[str, torch.Tensor]:
    """The inputs that a batch has; where one of named choices is left out its rows take all of them in turn, from `start`:
    what a program is measured on should see all that callers may choose."""
    made = {spec.name: batch[spec.name] for spec in inputs if spec.name in batch}
    sizes = {
        dim: size
        for spec in inputs
        if spec.name in made
        for dim, size in zip(spec.shape, made[spec.name].shape)
        if isinstance(dim, str)
    }
    for spec in inputs:
        if (
            spec.names
            and spec.name not in made
            and (isinstance(spec.shape[0], int) or spec.shape[0] in sizes)
        ):
            turns = torch.arange(start, start + _rows(spec, sizes), dtype=spec.dtype)
            made[spec.name] = turns % (len(spec.names) + 1)
    return made


def _rows(spec: TensorSpec, sizes: Mapping[str, int]) -> int:
    rows = spec.shape[0]
    if isinstance(rows, str) and rows not in sizes:
        raise InputError(f"missing input {spec.name!r}: expected {spec}")
    return rows if isinstance(rows, int) else sizes[rows]
