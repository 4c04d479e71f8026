"""The KV cache of a decoder's signature, recognized by the names and shapes of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bmgraph.ir.tensor_spec import Range, TensorSpec

BATCH, PAST = "batch", "past"
KEY, VALUE = "key", "value"
SCORED = "scored_positions"
"""The input i64[scored] that says which of the new positions to compute logits of."""
PAST_PREFIX, PRESENT_PREFIX, MEMORY_PREFIX = "past_", "present_", "memory_"


@dataclass(frozen=True)
class Slot:
    """One tensor of the KV cache: the input that holds it, the output that returns it with the new positions appended,
    and its axis of positions."""

    past: TensorSpec
    present: TensorSpec
    axis: int


@dataclass(frozen=True)
class CacheSpec:
    """The signature of a decoder with a KV cache: B rows, P cached positions, S new positions, V ids, K positions to score.

    - tokens i64[B, S]: ids of the new positions, S >= 1.
    - mask [B, P + S]: 0 hides a position from all that follow; None if the model takes no mask.
    - positions i64[B, S]: position numbers; None if the model computes them itself.
    - scored i64[K]: which of the S new positions to compute logits of; None if the logits are those of the last one.
    - logits f[B, K, V]: of the positions in `scored`.
    - slots: the tensors of the cache.
    - memories: outputs of an encoder, the same at every step.
    - others: inputs of one value per row, such as the delta to use.
    - limit: the largest P + S; None if there is no bound.
    """

    tokens: TensorSpec
    mask: TensorSpec | None
    positions: TensorSpec | None
    logits: TensorSpec
    slots: tuple[Slot, ...]
    memories: tuple[TensorSpec, ...]
    others: tuple[TensorSpec, ...]
    limit: int | None
    scored: TensorSpec | None = None

    @property
    def vocabulary(self) -> int:
        """The number of ids V: those that the decoder can read."""
        return id_count(self.tokens, int(self.logits.shape[-1]))

    def empty(self, rows: int) -> dict[str, torch.Tensor]:
        """The cache inputs for a batch of `rows` rows without cached positions (P = 0)."""
        return {
            slot.past.name: torch.zeros(
                [rows if dim == BATCH else 0 if isinstance(dim, str) else dim for dim in slot.past.shape],
                dtype=slot.past.dtype,
            )
            for slot in self.slots
        }


def id_count(spec: TensorSpec, otherwise: int) -> int:
    """The number of ids that an input of ids takes: the rows of its table, if they are known."""
    return otherwise if spec.values is None or spec.values[1] is None else spec.values[1] + 1


def cache_spec(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], ranges: Mapping[str, Range]
) -> CacheSpec | None:
    """The KV cache of a signature; None if it has none."""
    presents = {spec.name: spec for spec in outputs if spec.name.startswith(PRESENT_PREFIX)}
    slots = []
    for spec in inputs:
        name = PRESENT_PREFIX + spec.name.removeprefix(PAST_PREFIX)
        if spec.name.startswith(PAST_PREFIX) and name in presents and PAST in spec.shape:
            slots.append(Slot(spec, presents[name], spec.shape.index(PAST)))
    logits = [spec for spec in outputs if spec.name not in presents]
    if not slots or not logits:
        return None
    pasts = {slot.past.name for slot in slots}
    memories = tuple(spec for spec in inputs if spec.name.startswith(MEMORY_PREFIX))
    rest = [spec for spec in inputs if spec.name not in pasts and spec not in memories]
    tokens = rest[0]
    scored = next((spec for spec in rest if spec.name == SCORED), None)
    total_length = slots[0].present.shape[slots[0].axis]
    mask = next((spec for spec in rest if spec.shape[1:] == (total_length,)), None)
    positions = next((spec for spec in rest[1:] if spec.shape == tokens.shape), None)
    bounds = ranges.get(str(total_length))
    return CacheSpec(
        tokens=tokens,
        mask=mask,
        positions=positions,
        logits=logits[0],
        slots=tuple(slots),
        memories=memories,
        others=tuple(spec for spec in rest if spec not in (tokens, mask, positions, scored)),
        limit=bounds.high if bounds else None,
        scored=scored,
    )
