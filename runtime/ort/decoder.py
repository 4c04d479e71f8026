"""The KV cache on ONNX Runtime: it stays on the device from one decode step to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from bmgraph.errors import BackendError
from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.ort.session import import_onnxruntime

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue


class Encoder(Protocol):
    """The encoder engine of an encoder-decoder model."""

    inputs: tuple[TensorSpec, ...]

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs in order."""


class OrtDecoder:
    """A session of a model with a KV cache; `device` is ONNX Runtime's name of where the cache lies ("cpu" or "cuda")."""

    def __init__(
        self, session: InferenceSession, cache: CacheSpec, device: str, encoder: Encoder | None
    ) -> None:
        self.cache = cache
        self.encoder_inputs = encoder.inputs if encoder is not None else ()
        self._session, self._device, self._encoder = session, device, encoder

    def start(self, batch_size: int, encoder_feeds: Mapping[str, Array]) -> OrtDecodeState:
        """An empty cache for a batch; the encoder, if there is one, runs on `encoder_feeds`."""
        arrays = {name: value.numpy() for name, value in self.cache.empty(batch_size).items()}
        if self._encoder is not None:
            arrays |= dict(zip((spec.name for spec in self.cache.memories), self._encoder.run(encoder_feeds)))
        ort_value = import_onnxruntime().OrtValue
        cached = {name: ort_value.ortvalue_from_numpy(value, self._device) for name, value in arrays.items()}
        return OrtDecodeState(self._session, self.cache, cached, self._device)


class OrtDecodeState:
    """The KV cache and encoder outputs of one batch, as ONNX Runtime's own values, which are never copied to numpy."""

    def __init__(
        self, session: InferenceSession, cache: CacheSpec, cached: dict[str, OrtValue], device: str
    ) -> None:
        self._session, self._cache, self._cached, self._device = session, cache, cached, device

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """Append new tokens to the cache; returns the logits f[B, V] after the last one."""
        binding = self._session.io_binding()
        for name, value in feeds.items():
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
