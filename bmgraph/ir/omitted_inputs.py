"""Values of declared inputs that a caller may leave out: an empty cache, the positions to score, an encoder's outputs.

So a program with a KV cache scores a plain batch, as the model itself does: nothing is cached yet, and every position of
the batch is scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from bmgraph.errors import InputError
from bmgraph.ir.cache_spec import MEMORY_PREFIX, PAST, PAST_PREFIX, SCORED
from bmgraph.ir.tensor_spec import TensorSpec


class Encoder(Protocol):
    """A program or engine whose outputs are inputs of a decoder, by name."""

    inputs: tuple[TensorSpec, ...]

    def __call__(self, **batch: object) -> dict[str, torch.Tensor]:
        """The outputs by name."""


def omitted_value(
    spec: TensorSpec,
    inputs: Sequence[TensorSpec],
    batch: Mapping[str, object],
    sizes: Mapping[str, int],
    device: torch.device | str,
) -> torch.Tensor | None:
    """The value of an input that a batch leaves out; None where it must be given.

    A cache is empty if the batch holds no part of one. The positions to score are all new ones. `sizes` are the dynamic
    sizes known so far; the ids, the first of the inputs, are.
    """
    if spec.name == SCORED:
        return torch.arange(sizes[str(inputs[0].shape[1])], dtype=spec.dtype, device=device)
    if not _is_cache(spec) or any(_is_cache(item) and item.name in batch for item in inputs):
        return None
    known = {**sizes, PAST: 0}
    if any(isinstance(dim, str) and dim not in known for dim in spec.shape):
        return None
    return torch.zeros(
        [known[dim] if isinstance(dim, str) else dim for dim in spec.shape], dtype=spec.dtype, device=device
    )


def _is_cache(spec: TensorSpec) -> bool:
    return spec.name.startswith(PAST_PREFIX) and PAST in spec.shape


def check_scored(inputs: Sequence[TensorSpec], checked: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError for a position to score that the batch does not have: engines would wrap it or fail late."""
    value = checked.get(SCORED)
    if value is None or not value.numel():
        return
    length = checked[inputs[0].name].shape[1]
    low, high = (int(item) for item in torch.aminmax(value))
    if low < 0 or high >= length:
        raise InputError(
            f"input {SCORED!r} holds {low if low < 0 else high}: input {inputs[0].name!r} has positions 0 to {length - 1}"
        )


def with_encoded(
    encoder: Encoder | None, inputs: Sequence[TensorSpec], batch: Mapping[str, object]
) -> Mapping[str, object]:
    """A batch with the encoder's outputs in the place of the encoder's inputs, unless it holds such outputs already.

    Raises InputError, as the encoder does, where the encoder's inputs are missing or do not fit.
    """
    if encoder is None or any(name.startswith(MEMORY_PREFIX) for name in batch):
        return batch
    own, theirs = {spec.name for spec in inputs}, {spec.name for spec in encoder.inputs}
    encoded = encoder(**{name: value for name, value in batch.items() if name in theirs})
    return {**{name: value for name, value in batch.items() if name in own or name not in theirs}, **encoded}
