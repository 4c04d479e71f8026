"""Checks a batch against input specs before a program or an engine runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from bmgraph.errors import InputError
from bmgraph.ir.cache_spec import CacheLayout
from bmgraph.ir.categorical_input import check_indices, check_values, indices_of
from bmgraph.ir.given_tensor import as_tensor
from bmgraph.ir.omitted_inputs import check_scored, omitted_value
from bmgraph.ir.symbolic_dim import is_name, size_of
from bmgraph.ir.tensor_spec import Range, TensorSpec
from bmgraph.utils.did_you_mean import did_you_mean


def check_inputs(
    inputs: tuple[TensorSpec, ...],
    ranges: Mapping[str, Range],
    batch: Mapping[str, object],
    ignored: Collection[str] = (),
    cache: CacheLayout | None = None,
) -> dict[str, torch.Tensor]:
    """The batch as tensors, in the order of `inputs`, without what it holds of `ignored`.

    What a batch may leave out of a program with a `cache` is filled in: see `omitted_inputs`. Raises InputError for a
    missing or unknown name, for what is no tensor with values (see `given_tensor`), for a wrong dtype, number of dimensions
    or size, for two inputs that disagree about a dynamic size, and for a value that is looked up in a table that does not
    have it.
    """
    known = {spec.name for spec in inputs}
    if not isinstance(batch, Mapping):
        raise InputError(
            f"the batch is a {type(batch).__name__}: expected a dict of tensors by name ({', '.join(sorted(known))})"
        )
    for name in batch:
        if name not in known and name not in ignored:
            hint = did_you_mean(name, known)
            raise InputError(f"unknown input {name!r}{hint} (inputs: {', '.join(sorted(known))})")
    sizes: dict[str, tuple[int, str]] = {}
    checked: dict[str, torch.Tensor] = {}
    for spec in inputs:
        value = batch.get(spec.name)
        if spec.names:
            value = indices_of(spec, value, {name: size for name, (size, _) in sizes.items()})
        elif spec.name not in batch and cache is not None:
            known_sizes = {name: size for name, (size, _) in sizes.items()}
            value = omitted_value(spec, inputs, cache, batch, known_sizes, _device(checked))
        if value is None and not spec.names and spec.name not in batch:
            raise InputError(f"missing input {spec.name!r}: expected {spec}")
        checked[spec.name] = _check_one(spec, ranges, value, sizes)
        check_indices(spec, checked[spec.name])
        check_values(spec, checked[spec.name])
    if cache is not None:
        check_scored(cache, checked)
    _check_derived_sizes(inputs, {name: size for name, (size, _) in sizes.items()}, checked)
    return checked


def _device(checked: Mapping[str, torch.Tensor]) -> torch.device | str:
    return next((value.device for value in checked.values()), "cpu")


def _check_derived_sizes(
    inputs: tuple[TensorSpec, ...], sizes: Mapping[str, int], checked: Mapping[str, torch.Tensor]
) -> None:
    """Check the sizes that are computed from others, such as `past + sequence`."""
    for spec in inputs:
        for axis, dim in enumerate(spec.shape):
            expected = size_of(dim, sizes) if isinstance(dim, str) and not is_name(dim) else None
            found = checked[spec.name].shape[axis]
            if expected is not None and found != expected:
                raise InputError(
                    f"input {spec.name!r} has size {found} at dimension {axis}: expected {dim} = {expected}"
                )


def _check_one(
    spec: TensorSpec, ranges: Mapping[str, Range], given: object, sizes: dict[str, tuple[int, str]]
) -> torch.Tensor:
    value = as_tensor(f"input {spec.name!r}", given, str(spec))
    if value.dtype != spec.dtype:
        wanted = str(spec.dtype).removeprefix("torch.")
        raise InputError(
            f"input {spec.name!r} has dtype {str(value.dtype).removeprefix('torch.')}: expected {wanted}; "
            f"convert it with .to(torch.{wanted})"
        )
    found = tuple(value.shape)
    if len(found) != len(spec.shape):
        raise InputError(f"input {spec.name!r} has shape {list(found)}: expected {spec}")
    for axis, (size, dim) in enumerate(zip(found, spec.shape)):
        if isinstance(dim, int):
            if size != dim:
                raise InputError(
                    f"input {spec.name!r} has size {size} at dimension {axis}: this model fixes it to {dim}"
                )
            continue
        bounds = ranges.get(dim, Range())
        if size < bounds.low or (bounds.high is not None and size > bounds.high):
            high = "any" if bounds.high is None else str(bounds.high)
            raise InputError(
                f"input {spec.name!r} has {dim} {size} at dimension {axis}: this model takes {bounds.low} to {high}"
            )
        if dim in sizes and sizes[dim][0] != size:
            other_size, other = sizes[dim]
            raise InputError(
                f"input {spec.name!r} has {dim} {size}, but input {other!r} has {dim} {other_size}: they must be equal"
            )
        sizes.setdefault(dim, (size, spec.name))
    return value
