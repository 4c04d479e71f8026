"""Models that OpenVINO has compiled: one for each shape of the inputs, of which the last used are kept, or one for all shapes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from bmgraph.errors import BackendError, InputError
from bmgraph.ir.cache_spec import FLOAT, INT8, CacheLayout
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.openvino.cache_state import (
    appended_apart,
    keep_in_state,
    unfit_slot,
    unknown_sizes,
)
from bmgraph.runtime.openvino.compiled_model import CompiledModel
from bmgraph.runtime.openvino.library import (
    DEVICE,
    core,
    failures,
    first_line,
    onnx_frontend,
)
from bmgraph.runtime.openvino.stateful_model import StatefulModel

Shapes = tuple[tuple[int, ...], ...]
"""The shapes of the inputs, in order."""

STATIC, DYNAMIC = "static", "dynamic"

IN_FLOATS = "leave kv_cache out, and the cache is kept in what the engine computes in"
"""What to do where a cache cannot be kept in 8 bits."""

MOST_KEPT, LEAST_KEPT = 16, 2
KEPT_BYTES = 2**30
"""How many compiled models an engine keeps: as many as hold this much of weights, each its own, within these bounds."""


@dataclass(frozen=True)
class Settings:
    """How models are compiled. `precision`: what float32 is computed in, "f32" or "bf16"; `threads` of one call; `shapes`:
    STATIC or DYNAMIC; `cache`: a folder for what was compiled, which OpenVINO reads again without a check, "" for none; `timed`:
    each node is; `rounded_blocks`: the size of the blocks of their input that products of codes round to 8 bits, 0 for none; `kv_cache`: what
    a KV cache is kept in, FLOAT or INT8."""

    precision: str
    threads: int
    shapes: str = STATIC
    cache: str = ""
    timed: bool = False
    rounded_blocks: int = 0
    kv_cache: str = FLOAT

    @staticmethod
    def of(
        precision: str, threads: int | None, shapes: str, cache: str | None, kv_cache: str = FLOAT
    ) -> Settings:
        """Settings of options that may be left out: by default as many threads as torch has.

        Raises InputError for a number of threads below 1.
        """
        if threads is not None and (type(threads) is not int or threads < 1):
            raise InputError(f"threads={threads!r}: give a number of threads, 1 or more")
        return Settings(precision, threads or torch.get_num_threads(), shapes, cache or "", kv_cache=kv_cache)

    def as_config(self) -> dict[str, object]:
        """The properties that OpenVINO compiles with. Its own defaults are not taken where they change numbers: it would
        compute float32 in bf16, and round the activations of 8-bit weights, and the keys and values of a cache."""
        return {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": self.precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": self.rounded_blocks,
            "KV_CACHE_PRECISION": "u8" if self.kv_cache == INT8 else self.precision,
            **({"CACHE_DIR": self.cache} if self.cache else {}),
            **({"PERF_COUNT": True} if self.timed else {}),
        }


class CompiledModels:
    """The models that were compiled of one ONNX file, whose weights stay mapped. Thread-safe.

    With static shapes a shape that is not there is compiled before it answers: what a call gives depends on its inputs alone,
    whatever ran before. A model with a `cache` serves all shapes. `names` are those of the inputs in order, `outputs` those of the
    outputs, `size` is that of the file with its weights, `tables` are inputs that are the same for all runs.

    Raises BackendError if OpenVINO rejects the model.
    """

    def __init__(
        self,
        file: Path,
        names: Sequence[str],
        settings: Settings,
        size: int,
        *,
        outputs: Sequence[str] = (),
        cache: CacheLayout | None = None,
        tables: Mapping[str, Array] = MappingProxyType({}),
    ) -> None:
        self.file, self.settings, self.cache = file, settings, cache
        self.most = max(LEAST_KEPT, min(MOST_KEPT, KEPT_BYTES // max(1, size)))
        self._names, self._outputs, self._tables = list(names), list(outputs), tables
        self._lock = threading.Lock()
        self._kept: OrderedDict[Shapes, CompiledModel | StatefulModel] = OrderedDict()
        try:
            frontend = onnx_frontend()
            self._model = frontend.convert(frontend.load(str(file)))
        except failures() as error:
            raise BackendError(f"OpenVINO rejects {file}: {first_line(error)}") from error
        if cache is not None:
            self._keep_in_state(cache)

    def _keep_in_state(self, cache: CacheLayout) -> None:
        unfit = unfit_slot(self._model, cache)
        if unfit:
            raise BackendError(
                f"in its KV cache {unfit}, and that of an OpenVINO engine grows with the text: take the backend onnx"
            )
        try:
            keep_in_state(self._model, cache)
            unknown = unknown_sizes(self._model) if self.settings.kv_cache == INT8 else ""
        except failures() as error:
            raise BackendError(
                f"OpenVINO rejects the KV cache of {self.file}: {first_line(error)}"
            ) from error
        if unknown:
            raise BackendError(f"kv_cache={INT8!r}: {unknown}: {IN_FLOATS}")

    @property
    def shapes(self) -> list[Shapes]:
        """The shapes that are compiled now, the last used one at the end; empty with one dynamic model."""
        with self._lock:
            return [shape for shape in self._kept if shape]

    @property
    def serves_all(self) -> bool:
        """Whether one model serves all shapes."""
        return self.cache is not None or self.settings.shapes == DYNAMIC

    def stateful(self) -> StatefulModel:
        """The model that keeps the cache, of a model that has one."""
        found = self.at(())
        assert isinstance(found, StatefulModel)
        return found

    def at(self, shapes: Shapes) -> CompiledModel | StatefulModel:
        """The model for inputs of these shapes; raises BackendError where OpenVINO cannot compile it."""
        key = () if self.serves_all else shapes
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                found = self._kept[key] = self._made(self._compiled(key))
                while len(self._kept) > self.most:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return found

    def _made(self, compiled: Any) -> CompiledModel | StatefulModel:
        if self.cache is None:
            return CompiledModel(compiled, self._names, self._tables)
        made = StatefulModel(compiled, self._names, self._outputs, self.cache, self._tables)
        apart = appended_apart(made.runtime_model()) if self.settings.kv_cache == INT8 else 0
        if apart:
            raise BackendError(
                f"kv_cache={INT8!r}: OpenVINO appends to {apart} of the {len(self.cache.slots)} tensors of the cache outside of "
                f"attention, and would keep those in floats: {IN_FLOATS}"
            )
        return made

    def _compiled(self, shapes: Shapes) -> Any:
        try:
            model = self._model.clone()
            if shapes:
                model.reshape(dict(zip(self._names, map(list, shapes))))
            return core().compile_model(model, DEVICE, self.settings.as_config())
        except failures() as error:
            where = ", ".join(f"{name} {list(shape)}" for name, shape in zip(self._names, shapes))
            advice = (
                "" if shapes or self.cache is not None else "; take shapes='static', a model for each shape"
            )
            raise BackendError(
                f"OpenVINO cannot compile {self.file} for {where or 'all sizes'}: {first_line(error)}{advice}"
            ) from error
