"""The KV cache on TensorRT: memory on the GPU, to which each step appends in place.

B rows, P cached positions, S new ones, C those that there is room for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch

from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.runtime.generation.sampling import Array


class Session(Protocol):
    """What runs a plan."""

    def run(
        self,
        batch: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.dtype],
        placed: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The outputs by name; those in `placed` are written to memory that is given."""


class TensorRTDecoder:
    """Decodes with a plan whose cache has room for `room` positions; `session` gives it on `device`, or says why it cannot run here."""

    encoder_inputs: tuple[TensorSpec, ...] = ()

    def __init__(
        self, cache: CacheSpec, session: Callable[[], Session], device: str, room: int, longest_step: int
    ) -> None:
        self.cache, self.room, self.longest_step = cache, room, longest_step
        self._session, self._device = session, device

    def start(self, batch_size: int, encoder_feeds: Mapping[str, Array], most: int) -> TensorRTDecodeState:
        """An empty cache for a batch. Raises BackendError on hardware that the engine was not built for."""
        session = self._session()
        memory = {
            slot.past.name: torch.zeros(
                slot.empty_shape(batch_size, self.room), dtype=slot.past.dtype, device=self._device
            )
            for slot in self.cache.slots
        }
        return TensorRTDecodeState(session, self.cache, memory, self.longest_step)


class TensorRTDecodeState:
    """The KV cache of one batch, `memory` of B rows and C positions; a step reads at most `longest_step` new positions at once."""

    def __init__(
        self, session: Session, cache: CacheSpec, memory: dict[str, torch.Tensor], longest_step: int
    ) -> None:
        self._session, self._cache, self._memory, self._longest = session, cache, memory, longest_step
        self._held = 0

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """Append new tokens to the cache; returns the logits f[B, V] after the last one."""
        count = feeds[self._cache.tokens.name].shape[1]
        for begin in range(0, count, self._longest):
            logits = self._append(self._part(feeds, begin, min(begin + self._longest, count)))
        found: Array = logits[:, -1].float().cpu().numpy()
        return found

    def reorder(self, rows: Array) -> None:
        """Let each row go on with the cache of another one: row i with that of rows[i], i64[B]."""
        for slot in self._cache.slots:
            held = self._memory[slot.past.name].narrow(slot.axis, 0, self._held)
            held.copy_(held[torch.from_numpy(rows).to(held.device)])

    def _append(self, feeds: Mapping[str, Array]) -> torch.Tensor:
        given = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in feeds.items()}
        presents = {slot.present.name: self._memory[slot.past.name] for slot in self._cache.slots}
        dtypes = {
            spec.name: spec.dtype
            for spec in (self._cache.logits, *(slot.present for slot in self._cache.slots))
        }
        found = self._session.run({**given, **self._memory}, dtypes, presents)
        self._held += feeds[self._cache.tokens.name].shape[1]
        return found[self._cache.logits.name]

    def _part(self, feeds: Mapping[str, Array], begin: int, end: int) -> dict[str, Array]:
        """The feeds of the new positions from `begin` to `end`, of which the last is scored."""
        cache, count = self._cache, feeds[self._cache.tokens.name].shape[1]
        part = dict(feeds)
        for spec in (cache.tokens, cache.positions):
            if spec is not None:
                part[spec.name] = feeds[spec.name][:, begin:end]
        for spec in (cache.mask, cache.extent):
            if spec is not None:
                total = feeds[spec.name].shape[1]
                part[spec.name] = feeds[spec.name][:, : total - count + end]
        if cache.scored is not None:
            part[cache.scored.name] = np.array([end - begin - 1], np.int64)
        return part


def run_with_room(
    session: Session,
    cache: CacheSpec,
    inputs: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
    room: int,
    device: str,
) -> dict[str, torch.Tensor]:
    """The outputs of a call whose cache holds P positions, and no room for more: it runs on a copy that has."""
    memory: dict[str, torch.Tensor] = {}
    past = 0
    for slot in cache.slots:
        given = inputs[slot.past.name]
        past = given.shape[slot.axis]
        memory[slot.past.name] = torch.zeros(
            slot.empty_shape(given.shape[0], room), dtype=given.dtype, device=device
        )
        memory[slot.past.name].narrow(slot.axis, 0, past).copy_(given)
    presents = {slot.present.name: memory[slot.past.name] for slot in cache.slots}
    found = session.run({**inputs, **memory}, dtypes, presents)
    total = past + inputs[cache.tokens.name].shape[1]
    shown = {
        slot.present.name: presents[slot.present.name].narrow(slot.axis, 0, total) for slot in cache.slots
    }
    return {**found, **shown}
