"""Values of declared inputs that a caller may leave out: an empty cache, the positions to score, an encoder's outputs.

So a program with a KV cache scores a plain batch, as the model itself does: nothing is cached yet, and every position of
the batch is scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from bmgraph.errors import InputError
from bmgraph.ir.cache_spec import CacheLayout
from bmgraph.ir.symbolic_dim import size_of
from bmgraph.ir.tensor_spec import Dim, Range, TensorSpec


class Feeder(Protocol):
    """A program at a graph, or the engine of one, whose outputs are inputs of another, by name."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def ranges(self) -> Mapping[str, Range]:
        """The ranges of its dynamic sizes."""

    def __call__(self, **batch: object) -> dict[str, torch.Tensor]:
        """The outputs by name."""

    def feeders(self) -> Sequence[Feeder]:
        """What gives inputs of this one."""


def omitted_value(
    spec: TensorSpec,
    inputs: Sequence[TensorSpec],
    cache: CacheLayout,
    batch: Mapping[str, object],
    sizes: Mapping[str, int],
    device: torch.device | str,
) -> torch.Tensor | None:
    """The value of an input of a program with a cache that a batch leaves out; None where it must be given.

    A cache is empty if the batch holds no part of one. The positions to score are all new ones; what only has their number and that of
    cached ones as its size is made of zeros, and a mask that the model itself does not take, of ones. `sizes` are the dynamic
    sizes known so far.
    """
    if spec.name == cache.scored:
        length = _size(_named(inputs, cache.tokens).shape[1], sizes)
        return None if length is None else torch.arange(length, dtype=spec.dtype, device=device)
    if spec.name == cache.extent or (cache.own_mask and spec.name == cache.mask):
        whole = [size_of(dim, sizes) for dim in spec.shape]
        value = int(spec.name == cache.mask)
        return None if None in whole else torch.full(whole, value, dtype=spec.dtype, device=device)  # type: ignore[arg-type]
    slot = next((slot for slot in cache.slots if slot.past == spec.name), None)
    if slot is None or any(item.past in batch for item in cache.slots):
        return None
    shape = [
        0 if axis == slot.axis and isinstance(dim, str) else _size(dim, sizes)
        for axis, dim in enumerate(spec.shape)
    ]
    known = [size for size in shape if size is not None]
    return torch.zeros(known, dtype=spec.dtype, device=device) if len(known) == len(shape) else None


def _size(dim: Dim, sizes: Mapping[str, int]) -> int | None:
    return dim if isinstance(dim, int) else sizes.get(dim)


def _named(inputs: Sequence[TensorSpec], name: str) -> TensorSpec:
    return next(spec for spec in inputs if spec.name == name)


def check_scored(cache: CacheLayout, checked: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError for a position to score that the batch does not have: engines would wrap it or fail late."""
    value = checked[cache.scored] if cache.scored is not None else None
    if value is None or not value.numel():
        return
    length = checked[cache.tokens].shape[1]
    low, high = (int(item) for item in torch.aminmax(value))
    if low < 0 or high >= length:
        raise InputError(
            f"input {cache.scored!r} holds {low if low < 0 else high}: input {cache.tokens!r} has positions 0 to {length - 1}"
        )


def with_fed(
    feeders: Sequence[Feeder], inputs: Sequence[TensorSpec], batch: Mapping[str, object]
) -> Mapping[str, object]:
    """A batch with the outputs of each feeder in the place of its inputs, unless the batch holds such outputs already.

    Raises InputError, as the feeder does, where its inputs are missing or do not fit.
    """
    feeders = [item for item in feeders if not any(spec.name in batch for spec in item.outputs)]
    if not feeders:
        return batch
    wanted, taken = {spec.name for spec in inputs}, {spec.name for spec in inputs_of(feeders)}
    own = {name: value for name, value in batch.items() if name in wanted or name not in taken}
    return {**own, **{name: value for name, value in outputs_of(feeders, batch).items() if name in wanted}}


def outputs_of(feeders: Sequence[Feeder], batch: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """All outputs of feeders on a batch that may hold more than their inputs."""
    found: dict[str, torch.Tensor] = {}
    for feeder in feeders:
        taken = {spec.name for spec in (*inputs_of([feeder]), *feeder.inputs)}
        found |= feeder(**{name: value for name, value in batch.items() if name in taken})
    return found


def inputs_of(feeders: Sequence[Feeder]) -> tuple[TensorSpec, ...]:
    """The inputs that feeders need of a batch: their own, or, where others give these, the inputs of the others."""
    found: dict[str, TensorSpec] = {}
    for feeder in feeders:
        others = feeder.feeders()
        fed = {spec.name for other in others for spec in other.outputs}
        needed = (*(spec for spec in feeder.inputs if spec.name not in fed), *inputs_of(others))
        found = {**{spec.name: spec for spec in needed}, **found}
    return tuple(found.values())


def longest_sequence(feeders: Sequence[Feeder]) -> int | None:
    """How many positions the inputs [B, S] that feeders need of a batch may have; None without a bound."""
    ranges = [item.ranges for feeder in feeders for item in (feeder, *feeder.feeders())]
    sizes = {spec.shape[1] for spec in inputs_of(feeders) if len(spec.shape) == 2}
    bounds = [
        high
        for found in ranges
        for dim in sizes
        if dim in found and (high := found[str(dim)].high) is not None
    ]
    return min([*bounds, *(dim for dim in sizes if isinstance(dim, int))], default=None)
