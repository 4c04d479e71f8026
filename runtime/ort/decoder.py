"""The KV cache on ONNX Runtime: it stays on the device from one decode step to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.ir.omitted_inputs import Feeder, inputs_of, longest_sequence, outputs_of
from bmgraph.runtime.generation.batching.held_positions import HeldPositions
from bmgraph.runtime.generation.batching.joining import unfit_for_joining
from bmgraph.runtime.generation.batching.row_memories import RowMemories
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.ort.bound_session import BoundSession, run_bound
from bmgraph.runtime.ort.cache_memory import CacheMemory
from bmgraph.runtime.ort.ends_check import LONG, rows_may_end_apart
from bmgraph.runtime.ort.long_steps import pieces
from bmgraph.runtime.ort.rows_together import of_rows, rows_together
from bmgraph.runtime.ort.session import import_onnxruntime
from bmgraph.runtime.ort.table_inputs import TableInputs
from bmgraph.utils.host_memory import give_back_memory

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

    from bmgraph.runtime.ort.wide_form import WideForm

Wide = Callable[["OrtDecoder"], "WideForm | None"]
"""Makes the second form of a decoder's model, for steps of many positions, if there is one."""


class OrtDecoder:
    """A session of a model with a KV cache; `device` is ONNX Runtime's name of where the cache lies ("cpu" or "cuda").

    `wide` makes what steps of many positions may run on; see `for_batching`.
    """

    copies_all_rows = False
    encoded_in = 1

    def __init__(
        self,
        session: InferenceSession,
        cache: CacheSpec,
        device: str,
        feeders: Sequence[Feeder],
        tables: TableInputs,
        wide: Wide = lambda _: None,
    ) -> None:
        self.cache, self.tables = cache, tables
        self.encoder_inputs = inputs_of(feeders)
        self.longest_encoded = longest_sequence(feeders)
        self.equal_sizes: dict[bytes, dict[int, bool]] = {}
        self._session, self._device, self._feeders, self._wide = session, device, feeders, wide
        self._apart: bool | None = None
        self._widened: OrtDecoder | None = None
        self.wide_form: WideForm | None = None
        """What runs steps of many positions."""

    @property
    def session(self) -> InferenceSession:
        """The session of its first form."""
        return self._session

    @property
    def on_cpu(self) -> bool:
        """Whether its cache is on the CPU."""
        return self._device == "cpu"

    @property
    def no_rewinding(self) -> str:
        """Why positions cannot be taken back from a cache, or not all new ones be scored; empty if they can."""
        if self._device != "cpu":
            return f"its cache is on {self._device}, and only one on the CPU is shortened"
        if self.cache.scored is None:
            return "its model scores the last position alone: compile it anew"
        fixed = next((slot for slot in self.cache.slots if isinstance(slot.past.shape[slot.axis], int)), None)
        return "" if fixed is None else f"its cache {fixed.past} has a fixed number of positions"

    @property
    def no_joining(self) -> str:
        """Why rows of states cannot be put together; empty if they can."""
        return unfit_for_joining(self.cache, self.encoder_inputs)

    def for_batching(self, wide: bool) -> OrtDecoder:
        """This decoder; `wide` lets steps of many positions run on a second form of the model, where there is one."""
        if not wide:
            return self
        if self._widened is None:
            found = OrtDecoder(self._session, self.cache, self._device, self._feeders, self.tables)
            found._apart, found.wide_form = self.rows_end_apart, self._wide(self)
            self._widened = found if found.wide_form is not None else self
            give_back_memory()
        return self._widened

    @property
    def rows_end_apart(self) -> bool:
        """Whether rows that are joined begin at the first position and end where they end; tried when it is asked first."""
        if self._apart is None:
            may = self.cache.ends is not None and not self.cache.memories
            self._apart = may and rows_may_end_apart(
                self.cache, lambda apart: self._empty(1, {}, LONG + 1, apart)
            )
        return self._apart

    def start(self, batch_size: int, encoder_feeds: Mapping[str, Array], most: int) -> OrtDecodeState:
        """An empty cache for a batch, whose rows will have `most` positions at most; the graphs that give the memories run on
        `encoder_feeds`."""
        return self._empty(batch_size, outputs_of(self._feeders, encoder_feeds), most, bool(self._apart))

    def _empty(
        self, batch_size: int, found: Mapping[str, torch.Tensor], most: int, apart: bool
    ) -> OrtDecodeState:
        memories = RowMemories(self.cache.memories, found) if self.cache.memories else None
        memory = CacheMemory(self.cache, batch_size, self._device, most)
        return OrtDecodeState(
            self._session, self.cache, memory, memories, self.tables, self._device, apart, self.wide_form
        )


class OrtDecodeState:
    """The KV cache and encoder outputs of one batch, as ONNX Runtime's own values on `device`, which are never copied to numpy.

    `apart`: whether rows that join end apart. `wide` runs steps of many positions, if it is given.
    """

    def __init__(
        self,
        session: InferenceSession,
        cache: CacheSpec,
        memory: CacheMemory,
        memories: RowMemories | None,
        tables: TableInputs,
        device: str,
        apart: bool = False,
        wide: WideForm | None = None,
    ) -> None:
        self._cache, self._memory, self._rows, self._tables = cache, memory, memories, tables
        self._session, self._device, self._apart, self._wide = session, device, apart, wide
        self._memories = self._memory_values()
        self._bound = {False: BoundSession(session, cache, memory, self._memories, tables)}
        """By whether a step is of many positions."""

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """Append new tokens to the cache; returns the logits f[B, V] after the last one, in memory that the next step may overwrite."""
        for piece in pieces(self._cache, feeds):
            found = self._step(piece)
        return found

    def _step(self, feeds: Mapping[str, Array]) -> Array:
        parts = rows_together(self._cache, feeds, self._memory.held)
        if len(parts) > 1:
            return self._step_in_parts(feeds, parts)
        last: Array = self._for(feeds).scored(feeds, 1)[:, -1]
        return last

    def scores(self, feeds: Mapping[str, Array]) -> Array:
        """Append new tokens of one row to the cache; returns the logits f[K, V] of the scored ones, in memory that the next step may
        overwrite."""
        assert self._cache.scored is not None
        assert self._memory.rows == 1
        found: Array = self._for(feeds).scored(feeds, len(feeds[self._cache.scored.name]))[0]
        return found

    def reorder(self, rows: Array) -> None:
        """Let each row go on with the cache of another one: row i with that of rows[i], i64[B]."""
        self._memory.reorder(rows)

    def repeat_rows(self, each: int) -> None:
        """Let each row be followed by `each` - 1 others that hold what it holds."""
        self._memory.repeat_rows(each)

    def forget(self, count: int) -> None:
        """Take the last `count` positions from the cache."""
        self._memory.forget(count)

    def reserve(self, rows: int, most: int) -> None:
        """Have room for `rows` rows of `most` positions at most."""
        self._memory.reserve(rows, most)
        if self._rows is not None:
            self._rows.reserve(rows)

    def join(self, other: Self) -> None:
        """Take the rows of another state behind those that are there, their last positions at one place, or their first ones."""
        join = self._memory.join_apart if self._apart else self._memory.join
        join(other._memory)
        if self._rows is not None and other._rows is not None:
            self._rows.join(other._rows)
        self._rebind()

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Let only these rows go on, in this order."""
        self._memory.keep_rows(rows)
        if self._rows is not None:
            self._rows.keep_rows(rows)
        self._rebind()

    def forget_front(self, count: int) -> None:
        """Take the first `count` positions from the cache of all rows."""
        self._memory.forget_front(count)

    def positions(self, row: int, begin: int, end: int) -> HeldPositions:
        """A copy of what the cache holds of a row from one position to another."""
        return self._memory.positions(row, begin, end)

    def begin_with(self, parts: Sequence[HeldPositions]) -> None:
        """Let an empty cache of one row hold these positions."""
        self._memory.begin_with(parts)

    def _rebind(self) -> None:
        """Let the next steps read the encoder outputs of the rows that are there."""
        self._memories = self._memory_values()
        for bound in self._bound.values():
            bound.bind_memories(self._memories)

    def _memory_values(self) -> dict[str, OrtValue]:
        """The encoder outputs of the rows that are there."""
        if self._rows is None:
            return {}
        ort_value = import_onnxruntime().OrtValue
        return {
            name: ort_value.ortvalue_from_numpy(value.numpy(), self._device)
            for name, value in self._rows.values.items()
        }

    def _for(self, feeds: Mapping[str, Array]) -> BoundSession:
        """What runs a step."""
        wide = self._wide
        many = wide is not None and feeds[self._cache.tokens.name].size >= wide.least
        if many not in self._bound:
            assert wide is not None
            self._bound[many] = BoundSession(
                wide.session, self._cache, self._memory, self._memories, self._tables
            )
        return self._bound[many]

    def _step_in_parts(self, feeds: Mapping[str, Array], parts: Sequence[slice]) -> Array:
        """A step whose rows do not run together: each part appends to its own rows of the cache."""
        cache, found = self._cache, []
        self._memory.make_room(feeds[cache.tokens.name].shape[1])
        for part in parts:
            binding = self._session.io_binding()
            self._tables.bind(binding)
            own = {
                spec.name: of_rows(spec, feeds[spec.name], cache.tokens.shape[0], part)
                for spec in cache.given
                if spec.name in feeds
            }
            held = [
                of_rows(spec, self._memories[spec.name].numpy(), cache.tokens.shape[0], part)
                for spec in cache.memories
            ]
            own |= {spec.name: value for spec, value in zip(cache.memories, held)}
            for name, value in self._tables.narrowed(own).items():
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
            binding.bind_output(cache.logits.name, "cpu")
            views = self._memory.bind_rows(binding, part)
            run_bound(self._session, binding)
            found.append(binding.get_outputs()[0].numpy()[:, -1])
            del views
        return np.concatenate(found)
