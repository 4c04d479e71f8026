"""A session bound to one KV cache: what does not change from step to step is bound once."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch

from bmgraph.errors import BackendError
from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.ort.cache_memory import NOWHERE, CacheMemory
from bmgraph.runtime.ort.session import import_onnxruntime
from bmgraph.runtime.ort.table_inputs import TableInputs

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding, OrtValue


class BoundSession:
    """Runs steps of all rows of a cache, which other sessions of the same model may run between."""

    def __init__(
        self,
        session: InferenceSession,
        cache: CacheSpec,
        memory: CacheMemory,
        memories: Mapping[str, OrtValue],
        tables: TableInputs,
    ) -> None:
        self.session, self._cache, self._memory, self._tables = session, cache, memory, tables
        self._binding = session.io_binding()
        tables.bind(self._binding)
        self._room: Array = np.zeros(0, np.uint8)
        self._logits: Array = self._room
        self._place = NOWHERE
        self._bind_logits(1)  # the first output, whatever is bound later
        self.bind_memories(memories)

    def bind_memories(self, memories: Mapping[str, OrtValue]) -> None:
        """Have the next steps read these outputs of an encoder."""
        for name, value in memories.items():
            self._binding.bind_ortvalue_input(name, value)

    def scored(self, feeds: Mapping[str, Array], positions: int) -> Array:
        """Append new tokens to the cache; the logits f[B, K, V] of so many positions, if the program is told which, in memory that the
        next step may overwrite."""
        binding = self._binding
        for name, value in self._tables.narrowed(feeds).items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        self._bind_logits(positions)
        self._place = self._memory.bind(binding, feeds[self._cache.tokens.name].shape[1], self._place)
        run_bound(self.session, binding)
        if self._memory.grows or self._cache.scored is None:
            logits, *presents = binding.get_outputs()
            self._memory.keep(presents)
        if self._cache.scored is not None:
            return self._logits
        found: Array = logits.numpy()
        return found

    def _bind_logits(self, positions: int) -> None:
        """Bind memory for the logits of so many positions of each row, which stays where it is until they are more than ever; where a step
        may give those of others, memory that it makes."""
        spec = self._cache.logits
        if self._cache.scored is None:
            self._binding.bind_output(spec.name, "cpu")
            return
        shape = (self._memory.rows, positions, int(spec.shape[-1]))
        if shape == self._logits.shape:
            return
        if prod(shape) > len(self._room):
            self._room = torch.empty(prod(shape), dtype=spec.dtype).numpy()
        self._logits = self._room[: prod(shape)].reshape(shape)
        value = import_onnxruntime().OrtValue.ortvalue_from_numpy(self._logits, "cpu")
        self._binding.bind_ortvalue_output(spec.name, value)


def run_bound(session: InferenceSession, binding: IOBinding) -> None:
    """Run what is bound; raises BackendError."""
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # onnxruntime's exceptions have no public base
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackendError(f"the engine failed during generation: {first[:400]}") from error
