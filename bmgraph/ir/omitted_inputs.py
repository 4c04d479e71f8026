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
from bmgraph.ir.tensor_spec import Dim, TensorSpec


class Encoder(Protocol):
    """A program or engine whose outputs are inputs of a decoder, by name."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __call__(self, **batch: object) -> dict[str, torch.Tensor]:
        """The outputs by name."""


def omitted_value(
    spec: TensorSpec,
    inputs: Sequence[TensorSpec],
    cache: CacheLayout,
    batch: Mapping[str, object],
    sizes: Mapping[str, int],
    device: torch.device | str,
) -> torch.Tensor | None:
    """The value of an input of a program with a cache that a batch leaves out; None where it must be given.

    A cache is empty if the batch holds no part of one. The positions to score are all new ones. `sizes` are the dynamic
    sizes known so far.
    """
    if spec.name == cache.scored:
        length = _size(_named(inputs, cache.tokens).shape[1], sizes)
        return None if length is None else torch.arange(length, dtype=spec.dtype, device=device)
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


def with_encoded(
    encoder: Encoder | None, inputs: Sequence[TensorSpec], batch: Mapping[str, object]
) -> Mapping[str, object]:
    """A batch with the encoder's outputs in the place of the encoder's inputs, unless it holds such outputs already.

    Raises InputError, as the encoder does, where the encoder's inputs are missing or do not fit.
    """
    if encoder is None or any(spec.name in batch for spec in encoder.outputs):
        return batch
    own, theirs = {spec.name for spec in inputs}, {spec.name for spec in encoder.inputs}
    encoded = encoder(**{name: value for name, value in batch.items() if name in theirs})
    return {**{name: value for name, value in batch.items() if name in own or name not in theirs}, **encoded}
