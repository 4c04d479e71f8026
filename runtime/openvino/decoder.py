"""Decoding on OpenVINO: the KV cache is the state of a request, one for each batch.

Rows of a batch that go on, are repeated or change places are chosen by an input of the next step, and nothing is copied. Where rows join,
what the requests hold is read, put together and written again, one tensor of the cache after the other; all that join between two steps
are put together at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch

from bmgraph.errors import BackendError
from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.ir.omitted_inputs import Feeder, inputs_of, longest_sequence, outputs_of
from bmgraph.runtime.generation.batching.held_positions import HeldPositions, joined
from bmgraph.runtime.generation.batching.joining import unfit_for_joining
from bmgraph.runtime.generation.batching.row_memories import RowMemories
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.openvino.cache_state import read_tensor, write_tensor
from bmgraph.runtime.openvino.library import failures, first_line
from bmgraph.runtime.openvino.stateful_model import StatefulModel
from bmgraph.runtime.openvino.table_inputs import TableInputs


class OpenVinoDecoder:
    """A model that keeps its cache; the graphs that give its memories, such as an encoder, are `feeders`."""

    rows_end_apart = False  # attention takes a mask, and reads all positions
    copies_all_rows = True  # a request gives what it holds of all of them
    wide_form = None

    def __init__(
        self,
        model: StatefulModel,
        cache: CacheSpec,
        feeders: Sequence[Feeder],
        tables: TableInputs,
        encoded_in: int = 1,
    ) -> None:
        """`encoded_in`: of what multiple the number of positions is that prompts of a batch are encoded in."""
        self.cache, self.encoded_in = cache, encoded_in
        self.encoder_inputs = inputs_of(feeders)
        self.longest_encoded = longest_sequence(feeders)
        self._model, self._feeders, self._tables = model, feeders, tables

    @property
    def no_joining(self) -> str:
        """Why rows of states cannot be put together; empty if they can."""
        return unfit_for_joining(self.cache, self.encoder_inputs)

    def for_batching(self, wide: bool) -> Self:
        """Itself: all steps run alike."""
        return self

    def start(self, batch_size: int, encoder_feeds: Mapping[str, Array], most: int) -> OpenVinoDecodeState:
        """An empty cache for a batch, which grows to `most` positions at most; the graphs that give the memories run on
        `encoder_feeds`."""
        found = outputs_of(self._feeders, encoder_feeds)
        memories = RowMemories(self.cache.memories, found) if self.cache.memories else None
        return OpenVinoDecodeState(self._model, self.cache, batch_size, memories, self._tables)


class OpenVinoDecodeState:
    """The KV cache of one batch of `count` rows, in a request of its own, and its encoder outputs."""

    def __init__(
        self,
        model: StatefulModel,
        cache: CacheSpec,
        count: int,
        memories: RowMemories | None,
        tables: TableInputs,
    ) -> None:
        self._model, self._count, self._memories, self._tables = model, count, memories, tables
        self._request: Any = model.request()
        self._axes = {slot.past.name: slot.axis for slot in cache.slots}
        self._rows: Array | None = None
        """Which row of the request each row goes on with, at the next step; None for its own."""
        self._joining: list[OpenVinoDecodeState] = []
        """Those whose rows stand behind these at the next step."""
        self._dropped = self._dropped_of_all = 0
        """How many positions are taken from the front, before the others join and then."""

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """Append new tokens to the cache; returns the logits f[B, V] after the last one."""
        self._put_together()
        memories = {} if self._memories is None else self._memories.values
        given = self._tables.narrowed({**feeds, **{name: value.numpy() for name, value in memories.items()}})
        try:
            logits = self._model.step(self._request, given, self._rows)
        except failures() as error:
            raise BackendError(f"the engine failed during generation: {first_line(error)}") from error
        self._rows = None
        return logits[:, -1]

    def reorder(self, rows: Array) -> None:
        """Let each row go on with the cache of another one from the next step on: row i with that of rows[i], i64[B]."""
        self._put_together()
        self._rows = rows if self._rows is None else self._rows[rows]
        self._count = len(rows)

    def repeat_rows(self, each: int) -> None:
        """Let each row be followed by `each` - 1 others that hold what it holds."""
        self.reorder(np.arange(self._count).repeat(each))

    def reserve(self, rows: int, most: int) -> None:
        """The cache takes memory as it grows; that of encoder outputs is for so many rows."""
        if self._memories is not None:
            self._memories.reserve(rows)

    def join(self, other: OpenVinoDecodeState) -> None:
        """Take the rows of another state, which is used no more, behind those that are there, their last positions at one place."""
        self._joining.append(other)
        self._count += other._count
        if self._memories is not None and other._memories is not None:
            self._memories.join(other._memories)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Let only these rows go on, in this order."""
        self.reorder(np.array(rows, np.int64))
        if self._memories is not None:
            self._memories.keep_rows(rows)

    def forget_front(self, count: int) -> None:
        """Take the first `count` positions from the cache of all rows."""
        if self._joining:
            self._dropped_of_all += count
        else:
            self._dropped += count

    def forget(self, count: int) -> None:
        """Take the last `count` positions from the cache of all rows."""
        self._put_together()
        states = self._states()
        for name, axis in self._axes.items():
            value = self._read(states, name)
            write_tensor(states[name], _between(value, axis, 0, value.shape[axis] - count))
        self._rows = None

    def positions(self, row: int, begin: int, end: int) -> HeldPositions:
        """A copy of what the cache holds of a row from one position to another."""
        self._put_together()
        states = self._states()
        parts = [
            _between(self._read(states, name), axis, begin, end)[row : row + 1].copy()
            for name, axis in self._axes.items()
        ]
        return HeldPositions(tuple(map(torch.from_numpy, parts)), tuple(self._axes.values()))

    def begin_with(self, parts: Sequence[HeldPositions]) -> None:
        """Let an empty cache of one row hold these positions."""
        states = self._states()
        for name, value in zip(self._axes, joined(parts)):
            write_tensor(states[name], value.numpy())

    def _states(self) -> dict[str, Any]:
        return {state.name: state for state in self._request.query_state()}

    def _read(self, states: Mapping[str, Any], name: str) -> Array:
        """What a slot holds of the rows that are there, without the positions that are dropped."""
        value = read_tensor(states[name])
        if self._rows is not None:
            value = value[self._rows]
        axis = self._axes[name]
        return _between(value, axis, self._dropped, value.shape[axis])

    def _put_together(self) -> None:
        """Have the request hold the rows that join, and none of the positions that are dropped."""
        if not self._joining and not self._dropped:
            return
        for other in self._joining:
            other._put_together()
        members = [(item, item._states()) for item in (self, *self._joining)]
        for name, axis in self._axes.items():
            values = [item._read(states, name) for item, states in members]
            longest = max(value.shape[axis] for value in values)
            rows = [_behind_zeros(value, axis, longest - value.shape[axis]) for value in values]
            whole = np.concatenate(rows) if len(rows) > 1 else rows[0]
            write_tensor(members[0][1][name], _between(whole, axis, self._dropped_of_all, longest))
        self._rows, self._joining = None, []
        self._dropped = self._dropped_of_all = 0


def _between(value: Array, axis: int, begin: int, end: int) -> Array:
    """The positions of a slot from one to another."""
    part: Array = value[(*[slice(None)] * axis, slice(begin, end))]
    return part


def _behind_zeros(value: Array, axis: int, count: int) -> Array:
    """What a slot holds, behind `count` positions of zeros."""
    if not count:
        return value
    return np.pad(value, [(count, 0) if place == axis else (0, 0) for place in range(value.ndim)])
