"""A compiled model that keeps the KV cache of a decoder in its requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bmgraph.ir.cache_spec import CacheLayout
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.openvino.cache_state import ROWS, load_state, state_values
from bmgraph.runtime.openvino.compiled_model import CompiledModel


class StatefulModel:
    """A compiled model whose cache `keep_in_state` made variables, for all sizes. Several threads may run it at a time.

    `names` are those of the inputs of the graph, and `outputs` those of its outputs, the cache among them: `run` takes and gives
    it as the graph does; `step` leaves it in the request.
    """

    def __init__(
        self,
        model: Any,
        names: Sequence[str],
        outputs: Sequence[str],
        cache: CacheLayout,
        tables: Mapping[str, Array],
    ) -> None:
        self.cache = cache
        pasts = {slot.past for slot in cache.slots}
        self.inner = CompiledModel(model, [*(name for name in names if name not in pasts), ROWS], tables)
        self._given = [name for name in names if name not in pasts]
        held = {slot.present: slot.past for slot in cache.slots}
        places = [
            next((index for index, found in enumerate(self.inner.output_names) if name in found), 0)
            for name in outputs
        ]
        self._outputs: list[str | int] = [held.get(name, place) for name, place in zip(outputs, places)]
        self.logits = outputs.index(cache.logits)

    @property
    def output_names(self) -> list[set[str]]:
        """The names of each output, those of the cache in its place."""
        presents = {slot.past: slot.present for slot in self.cache.slots}
        found = self.inner.output_names
        return [{presents[item]} if isinstance(item, str) else found[item] for item in self._outputs]

    @property
    def precision(self) -> str:
        """What OpenVINO says that it computes float32 in."""
        return self.inner.precision

    def runtime_model(self) -> Any:
        """OpenVINO's graph of what is executed."""
        return self.inner.runtime_model()

    def node_times(self) -> list[tuple[str, str, float]]:
        """The name, the type and the microseconds of each node in the last run, of a model that is `timed`."""
        return self.inner.node_times()

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs in order, for feeds that hold a cache."""
        request = self.inner.taken()
        load_state(request, self.cache.slots, feeds)
        results = self.inner.run_on(request, self._with_rows(feeds))
        states = state_values(request)
        self.inner.give_back(request)
        return [states[item] if isinstance(item, str) else results[item] for item in self._outputs]

    def request(self) -> Any:
        """A request of one's own, whose cache is empty."""
        return self.inner.request()

    def step(self, request: Any, feeds: Mapping[str, Array], rows: Array | None = None) -> Array:
        """Append new positions to the cache of a request; returns the logits f[B, K, V]. `rows` i64[B]: the row of the cache that each row
        goes on with, by default its own."""
        place = self._outputs[self.logits]
        assert isinstance(place, int)
        return self.inner.run_on(request, self._with_rows(feeds, rows))[place]

    def _with_rows(self, feeds: Mapping[str, Array], rows: Array | None = None) -> dict[str, Array]:
        chosen = np.arange(len(feeds[self.cache.tokens])) if rows is None else rows
        return {**{name: feeds[name] for name in self._given}, ROWS: chosen.astype(np.int32)}
