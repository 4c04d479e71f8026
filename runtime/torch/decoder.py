"""Decoding on torch: the KV cache of a batch, and the steps that append to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch

from bmgraph.deltas.row_tables import RowTables
from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.ir.omitted_inputs import Feeder, inputs_of, longest_sequence, outputs_of
from bmgraph.ir.program import Program
from bmgraph.runtime.generation.batching.held_positions import HeldPositions, joined
from bmgraph.runtime.generation.batching.joining import unfit_for_joining
from bmgraph.runtime.generation.batching.row_memories import RowMemories
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.torch.held_cache import HeldCache
from bmgraph.runtime.torch.one_token_steps import OneTokenSteps
from bmgraph.runtime.torch.stream.streamed_graph import StreamedGraph, size_at
from bmgraph.runtime.torch.tables import narrowed


class TorchDecoder:
    """Decodes with a program that has a KV cache, and with the graphs that give its memories, such as an encoder.

    `steps`: what runs steps for one new position of each row; None where all steps run alike.
    """

    def __init__(
        self,
        program: Program,
        module: Callable[..., Any],
        cache: CacheSpec,
        feeders: Sequence[Feeder],
        form: RowTables | None,
        device: torch.device,
        steps: OneTokenSteps | None = None,
    ) -> None:
        self.cache, self._device = cache, device
        self.encoder_inputs = inputs_of(feeders)
        self.longest_encoded = longest_sequence(feeders)
        self._program, self._module, self._feeders, self._form = program, module, feeders, form
        self.steps = steps

    @property
    def no_joining(self) -> str:
        """Why rows of states cannot be put together; empty if they can."""
        return unfit_for_joining(self.cache, self.encoder_inputs)

    rows_end_apart = False  # attention takes a mask, and reads all positions

    wide_form = None
    copies_all_rows = False
    encoded_in = 1

    def for_batching(self, wide: bool) -> Self:
        """Itself: all steps run alike."""
        return self

    def start(self, batch_size: int, encoder_feeds: Mapping[str, Array], most: int) -> TorchDecodeState:
        """An empty cache for a batch, which grows to `most` positions at most; the graphs that give the memories run on
        `encoder_feeds`."""
        cached = {name: value.to(self._device) for name, value in self.cache.empty(batch_size).items()}
        memories = outputs_of(self._feeders, encoder_feeds)
        cached |= {spec.name: memories[spec.name] for spec in self.cache.memories}
        if isinstance(self._module, StreamedGraph):
            self._module.schedule(self._last_shapes(batch_size, cached, most))
        return TorchDecodeState(
            self._module,
            self.cache,
            [spec.name for spec in self._program.inputs],
            cached,
            self._form,
            self.steps,
        )

    def _last_shapes(
        self, rows: int, cached: Mapping[str, torch.Tensor], most: int
    ) -> tuple[tuple[int, ...], ...]:
        """The shapes of all inputs at a step with one new position, the last of `most`."""
        sizes = self.cache.sizes_of_step(rows, max(0, most - 1))
        for spec in self.cache.memories:
            sizes |= {str(dim): size for dim, size in zip(spec.shape, cached[spec.name].shape)}
        return tuple(tuple(size_at(dim, sizes, 1) for dim in spec.shape) for spec in self._program.inputs)


class TorchDecodeState:
    """The KV cache and encoder outputs of one batch; `names` are the module's inputs in order."""

    def __init__(
        self,
        module: Callable[..., Any],
        cache: CacheSpec,
        names: list[str],
        cached: dict[str, torch.Tensor],
        form: RowTables | None,
        steps: OneTokenSteps | None,
    ) -> None:
        self._module, self._cache, self._names = module, cache, names
        self._form = form
        self._memories = RowMemories(cache.memories, cached) if cache.memories else None
        self._held = HeldCache(cache.slots, {slot.past.name: cached[slot.past.name] for slot in cache.slots})
        self._steps = None if steps is None else steps.of_batch(self._held)

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """Append new tokens to the cache; returns the logits f[B, V] after the last one."""
        arrays = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in feeds.items()}
        given = dict(narrowed(self._form, arrays))
        memories = {} if self._memories is None else self._memories.values
        if self._steps is not None and given[self._cache.tokens.name].shape[1] == 1:
            logits = self._steps.step(given, memories)
        else:
            device = next(iter(self._held.values())).device
            values = {name: value.to(device) for name, value in given.items()} | {
                **self._held,
                **memories,
            }
            with torch.no_grad():
                logits, *presents = self._module(*(values[name] for name in self._names))
            for slot, present in zip(self._cache.slots, presents):
                self._held[slot.past.name] = present
        last: Array = logits[:, -1].float().cpu().numpy()
        return last

    def reorder(self, rows: Array) -> None:
        """Let each row go on with the cache of another one: row i with that of rows[i], i64[B]."""
        for slot in self._cache.slots:
            held = self._held[slot.past.name]
            self._held[slot.past.name] = held[torch.from_numpy(rows).to(held.device)]

    def repeat_rows(self, each: int) -> None:
        """Let each row be followed by `each` - 1 others that hold what it holds."""
        rows = next(iter(self._held.values())).shape[0]
        self.reorder(np.arange(rows).repeat(each))

    def reserve(self, rows: int, most: int) -> None:
        """The cache takes memory as it grows; that of encoder outputs is for so many rows."""
        if self._memories is not None:
            self._memories.reserve(rows)

    def join(self, other: Self) -> None:
        """Take the rows of another state behind those that are there, their last positions at one place."""
        for slot in self._cache.slots:
            own, new = (state._held[slot.past.name] for state in (self, other))
            longest = max(own.shape[slot.axis], new.shape[slot.axis])
            both = [_behind_zeros(item, slot.axis, longest - item.shape[slot.axis]) for item in (own, new)]
            self._held[slot.past.name] = torch.cat(both)
        if self._memories is not None and other._memories is not None:
            self._memories.join(other._memories)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Let only these rows go on, in this order."""
        self.reorder(np.array(rows, np.int64))
        if self._memories is not None:
            self._memories.keep_rows(rows)

    def forget_front(self, count: int) -> None:
        """Take the first `count` positions from the cache of all rows."""
        self._keep_positions(slice(count, None))

    def forget(self, count: int) -> None:
        """Take the last `count` positions from the cache of all rows."""
        self._keep_positions(slice(-count))

    def _keep_positions(self, kept: slice) -> None:
        for slot in self._cache.slots:
            index = (*[slice(None)] * slot.axis, kept)
            self._held[slot.past.name] = self._held[slot.past.name][index].clone()

    def positions(self, row: int, begin: int, end: int) -> HeldPositions:
        """A copy of what the cache holds of a row from one position to another."""
        slots = self._cache.slots
        held = (self._held[slot.past.name][row : row + 1] for slot in slots)
        whole = HeldPositions(tuple(held), tuple(slot.axis for slot in slots))
        return whole.part(begin, end).copied()

    def begin_with(self, parts: Sequence[HeldPositions]) -> None:
        """Let an empty cache of one row hold these positions."""
        for slot, whole in zip(self._cache.slots, joined(parts)):
            self._held[slot.past.name] = whole


def _behind_zeros(values: torch.Tensor, axis: int, count: int) -> torch.Tensor:
    """What a slot holds, behind `count` positions of zeros."""
    if not count:
        return values
    front = values.new_zeros([count if place == axis else size for place, size in enumerate(values.shape)])
    return torch.cat([front, values], axis)
