"""A cache of keys and values on ONNX Runtime: what a step gives stays where it is and is read by the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from bmgraph.errors import BackendError
from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.ort.session import import_onnxruntime


class Encoder(Protocol):
    """An engine that runs before a decoder."""

    inputs: tuple[TensorSpec, ...]

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Its outputs in order."""


class OrtDecoder:
    """A session whose model has a cache; `device` is where ONNX Runtime keeps it ("cpu" or "cuda")."""

    def __init__(self, session: Any, cache: CacheSpec, device: str, encoder: Encoder | None) -> None:
        self.cache = cache
        self.source = encoder.inputs if encoder is not None else ()
        self._session, self._device, self._encoder = session, device, encoder

    def begin(self, rows: int, source: Mapping[str, Array]) -> OrtSteps:
        """An empty cache for a batch, whose encoder has read `source`."""
        held = {name: value.numpy() for name, value in self.cache.empty(rows).items()}
        if self._encoder is not None:
            held |= dict(zip((spec.name for spec in self.cache.memories), self._encoder.run(source)))
        values = import_onnxruntime().OrtValue
        kept = {name: values.ortvalue_from_numpy(value, self._device) for name, value in held.items()}
        return OrtSteps(self._session, self.cache, kept, self._device)


class OrtSteps:
    """One generation on a session. `held` are ONNX Runtime's own values, read at every step beside the tokens: the cache
    is never copied out."""

    def __init__(self, session: Any, cache: CacheSpec, held: dict[str, Any], device: str) -> None:
        self._session, self._cache, self._held, self._device = session, cache, held, device

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """Read new tokens behind those in the cache; the logits f[B, V] after the last one."""
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, held in self._held.items():
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
        self._held |= {slot.past.name: held for slot, held in zip(self._cache.slots, presents)}
        found: Array = logits.numpy()
        return found[:, -1]
