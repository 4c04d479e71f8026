"""The KV cache on ONNX Runtime: it stays on the device from one decode step to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bmgraph.errors import BackendError
from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.ir.omitted_inputs import Feeder, inputs_of, outputs_of
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.ort.session import import_onnxruntime
from bmgraph.runtime.ort.table_inputs import TableInputs

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue


class OrtDecoder:
    """A session of a model with a KV cache; `device` is ONNX Runtime's name of where the cache lies ("cpu" or "cuda")."""

    def __init__(
        self,
        session: InferenceSession,
        cache: CacheSpec,
        device: str,
        feeders: Sequence[Feeder],
        tables: TableInputs,
    ) -> None:
        self.cache = cache
        self.encoder_inputs = inputs_of(feeders)
        self._session, self._device, self._feeders, self._tables = session, device, feeders, tables

    def start(self, batch_size: int, encoder_feeds: Mapping[str, Array]) -> OrtDecodeState:
        """An empty cache for a batch; the graphs that give the memories run on `encoder_feeds`."""
        arrays = {name: value.numpy() for name, value in self.cache.empty(batch_size).items()}
        memories = outputs_of(self._feeders, encoder_feeds)
        arrays |= {spec.name: memories[spec.name].numpy() for spec in self.cache.memories}
        ort_value = import_onnxruntime().OrtValue
        cached = {name: ort_value.ortvalue_from_numpy(value, self._device) for name, value in arrays.items()}
        return OrtDecodeState(self._session, self.cache, cached, self._device, self._tables)


class OrtDecodeState:
    """The KV cache and encoder outputs of one batch, as ONNX Runtime's own values, which are never copied to numpy."""

    def __init__(
        self,
        session: InferenceSession,
        cache: CacheSpec,
        cached: dict[str, OrtValue],
        device: str,
        tables: TableInputs,
    ) -> None:
        self._session, self._cache, self._cached, self._device = session, cache, cached, device
        self._binding = session.io_binding()  # kept: what does not change from step to step is bound once
        tables.bind(self._binding)
        self._tables = tables

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """Append new tokens to the cache; returns the logits f[B, V] after the last one."""
        binding = self._binding
        for name, value in self._tables.narrowed(feeds).items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, cached in self._cached.items():
            binding.bind_ortvalue_input(name, cached)
        binding.bind_output(self._cache.logits.name, "cpu")
        for slot in self._cache.slots:
            binding.bind_output(slot.present.name, self._device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's exceptions have no public base
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BackendError(f"the engine failed during generation: {first[:400]}") from error
        logits, *presents = binding.get_outputs()
        self._cached |= {slot.past.name: present for slot, present in zip(self._cache.slots, presents)}
        scores: Array = logits.numpy()
        return scores[:, -1]
