"""A cache of keys and values on ONNX Runtime: what a step gives stays where it is and is read by the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bmgraph.caching.spec import CacheSpec
from bmgraph.errors import BackendError
from bmgraph.runtime.sampling import Array
from bmgraph.runtime.session import import_onnxruntime


class OrtDecoder:
    """A session whose model has a cache; `device` is where ONNX Runtime keeps it ("cpu" or "cuda")."""

    def __init__(self, session: Any, cache: CacheSpec, device: str) -> None:
        self.cache = cache
        self._session, self._device = session, device

    def begin(self, rows: int) -> OrtSteps:
        """An empty cache for a batch."""
        return OrtSteps(self._session, self.cache, rows, self._device)


class OrtSteps:
    """One generation on a session; the cache is held in ONNX Runtime's own values and never copied out."""

    def __init__(self, session: Any, cache: CacheSpec, rows: int, device: str) -> None:
        self._session, self._cache, self._device = session, cache, device
        values = import_onnxruntime().OrtValue
        self._past = {
            name: values.ortvalue_from_numpy(empty.numpy(), device)
            for name, empty in cache.empty(rows).items()
        }

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """Read new tokens behind those in the cache; the logits f[B, V] after the last one."""
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, held in self._past.items():
            binding.bind_ortvalue_input(name, held)
        binding.bind_output(self._cache.logits.name, "cpu")
        for slot in self._cache.slots:
            binding.bind_output(slot.present.name, self._device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's exceptions have no public base
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BackendError(f"the engine failed while it generated: {first[:400]}") from error
        logits, *presents = binding.get_outputs()
        self._past = {slot.past.name: held for slot, held in zip(self._cache.slots, presents)}
        found: Array = logits.numpy()
        return found[:, -1]
