"""Decoding on OpenVINO: the KV cache is the state of a request, one for each batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bmgraph.errors import BackendError
from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.ir.omitted_inputs import Feeder, inputs_of, outputs_of
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.openvino.library import failures, first_line
from bmgraph.runtime.openvino.stateful_model import StatefulModel
from bmgraph.runtime.openvino.table_inputs import TableInputs


class OpenVinoDecoder:
    """A model that keeps its cache; the graphs that give its memories, such as an encoder, are `feeders`."""

    def __init__(
        self, model: StatefulModel, cache: CacheSpec, feeders: Sequence[Feeder], tables: TableInputs
    ) -> None:
        self.cache = cache
        self.encoder_inputs = inputs_of(feeders)
        self._model, self._feeders, self._tables = model, feeders, tables

    def start(self, batch_size: int, encoder_feeds: Mapping[str, Array], most: int) -> OpenVinoDecodeState:
        """An empty cache for a batch, which grows to `most` positions at most; the graphs that give the memories run on
        `encoder_feeds`."""
        found = outputs_of(self._feeders, encoder_feeds)
        memories = {spec.name: found[spec.name].numpy() for spec in self.cache.memories}
        return OpenVinoDecodeState(self._model, memories, self._tables)


class OpenVinoDecodeState:
    """The KV cache of one batch, in a request of its own, and its encoder outputs."""

    def __init__(self, model: StatefulModel, memories: Mapping[str, Array], tables: TableInputs) -> None:
        self._model, self._memories, self._tables = model, memories, tables
        self._request: Any = model.request()
        self._rows: Array | None = None

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """Append new tokens to the cache; returns the logits f[B, V] after the last one."""
        given = self._tables.narrowed({**feeds, **self._memories})
        try:
            logits = self._model.step(self._request, given, self._rows)
        except failures() as error:
            raise BackendError(f"the engine failed during generation: {first_line(error)}") from error
        self._rows = None
        return logits[:, -1]

    def reorder(self, rows: Array) -> None:
        """Let each row go on with the cache of another one from the next step on: row i with that of rows[i], i64[B]."""
        self._rows = rows
