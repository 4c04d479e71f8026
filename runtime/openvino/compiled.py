"""Models that OpenVINO has compiled: one for each shape of the inputs, of which the last used are kept, or one for all shapes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bmgraph.errors import BackendError, InputError
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.openvino.library import (
    DEVICE,
    core,
    failures,
    first_line,
    import_openvino,
    onnx_frontend,
)
from bmgraph.runtime.ort.output_buffers import Buffers

Shapes = tuple[tuple[int, ...], ...]
"""The shapes of the inputs, in order."""

STATIC, DYNAMIC = "static", "dynamic"

MOST_KEPT, LEAST_KEPT = 16, 2
KEPT_BYTES = 2**30
"""How many compiled models an engine keeps: as many as hold this much of weights, each its own, within these bounds."""

SMALL = 2**17
"""Below this many elements an output is copied; above, the model writes it where the caller reads it."""


@dataclass(frozen=True)
class Settings:
    """How models are compiled. `precision`: what float32 is computed in, "f32" or "bf16"; `threads` of one call; `shapes`:
    STATIC or DYNAMIC; `cache`: a folder for what was compiled, which OpenVINO reads again without a check, "" for none; `timed`:
    each node is."""

    precision: str
    threads: int
    shapes: str = STATIC
    cache: str = ""
    timed: bool = False

    @staticmethod
    def of(precision: str, threads: int | None, shapes: str, cache: str | None) -> Settings:
        """Settings of options that may be left out: by default as many threads as torch has.

        Raises InputError for a number of threads below 1.
        """
        if threads is not None and (type(threads) is not int or threads < 1):
            raise InputError(f"threads={threads!r}: give a number of threads, 1 or more")
        return Settings(precision, threads or torch.get_num_threads(), shapes, cache or "")

    def as_config(self) -> dict[str, object]:
        """The properties that OpenVINO compiles with. Its own defaults are not taken where they change numbers: it would
        compute float32 in bf16, and round the activations of 8-bit weights."""
        return {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": self.precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            **({"CACHE_DIR": self.cache} if self.cache else {}),
            **({"PERF_COUNT": True} if self.timed else {}),
        }


class CompiledModels:
    """The models that were compiled of one ONNX file, whose weights stay mapped. Thread-safe.

    With static shapes a shape that is not there is compiled before it answers: what a call gives depends on its inputs alone,
    whatever ran before. `names` are those of the inputs in order, `size` is that of the file with its weights.

    Raises BackendError if OpenVINO rejects the model.
    """

    def __init__(self, file: Path, names: Sequence[str], settings: Settings, size: int) -> None:
        self.file, self.settings = file, settings
        self.most = max(LEAST_KEPT, min(MOST_KEPT, KEPT_BYTES // max(1, size)))
        self._names = list(names)
        self._lock = threading.Lock()
        self._kept: OrderedDict[Shapes, CompiledModel] = OrderedDict()
        try:
            frontend = onnx_frontend()
            self._model = frontend.convert(frontend.load(str(file)))
        except failures() as error:
            raise BackendError(f"OpenVINO rejects {file}: {first_line(error)}") from error

    @property
    def shapes(self) -> list[Shapes]:
        """The shapes that are compiled now, the last used one at the end; empty with one dynamic model."""
        with self._lock:
            return [shape for shape in self._kept if shape]

    def at(self, shapes: Shapes) -> CompiledModel:
        """The model for inputs of these shapes; raises BackendError where OpenVINO cannot compile it."""
        key = shapes if self.settings.shapes == STATIC else ()
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                found = self._kept[key] = CompiledModel(self._compiled(key), self._names)
                while len(self._kept) > self.most:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return found

    def _compiled(self, shapes: Shapes) -> Any:
        try:
            model = self._model.clone()
            if shapes:
                model.reshape(dict(zip(self._names, map(list, shapes))))
            return core().compile_model(model, DEVICE, self.settings.as_config())
        except failures() as error:
            where = ", ".join(f"{name} {list(shape)}" for name, shape in zip(self._names, shapes))
            raise BackendError(
                f"OpenVINO cannot compile {self.file}{f' for {where}' if where else ''}: {first_line(error)}"
            ) from error


class CompiledModel:
    """One compiled model, and its requests that nobody uses; several threads may run it at a time."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        self._model = model
        self._places = [_place(model.inputs, name) for name in names]
        self._idle: list[Any] = []
        self._buffers = Buffers()
        self._tensor = import_openvino().Tensor
        self._outputs = [_fixed_output(port) for port in model.outputs]

    @property
    def precision(self) -> str:
        """What OpenVINO says that it computes float32 in: "f32", "bf16" or "f16"."""
        return str(self._model.get_property("INFERENCE_PRECISION_HINT").get_type_name())

    @property
    def output_names(self) -> list[set[str]]:
        """The names of each output."""
        return [set(port.get_names()) for port in self._model.outputs]

    def runtime_model(self) -> Any:
        """OpenVINO's graph of what is executed, with the layer type and precision of each node."""
        return self._model.get_runtime_model()

    def node_times(self) -> list[tuple[str, str, float]]:
        """The name, the type and the microseconds of each node in the last run, of a model that is `timed`."""
        return [
            (item.node_name, item.node_type, item.real_time.total_seconds() * 1e6)
            for item in self._idle[-1].profiling_info
            if item.real_time.total_seconds() > 0
        ]

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs in order; `feeds` are arrays of the model's shapes, in the order of its names."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._model.create_infer_request()
        tensor = self._tensor
        given = [tensor(_writable(value), shared_memory=True) for value in feeds.values()]
        for place, value in zip(self._places, given):
            request.set_input_tensor(place, value)
        bound: dict[int, Array] = {}
        for index, form in enumerate(self._outputs):
            if form is not None:
                bound[index] = self._buffers.take(*form)
                request.set_output_tensor(index, tensor(bound[index], shared_memory=True))
        request.infer(
            share_outputs=True
        )  # else it would copy all outputs into the result, which nobody reads
        results = [
            bound[index] if index in bound else np.array(request.get_output_tensor(index).data)
            for index in range(len(self._outputs))
        ]
        self._idle.append(request)
        return results


def _place(ports: Sequence[Any], name: str) -> int:
    return next(index for index, port in enumerate(ports) if name in port.get_names())


def _fixed_output(port: Any) -> tuple[tuple[int, ...], np.dtype[Any]] | None:
    """The shape and type of a large output, which the model writes into memory of ours; None for another."""
    shape = port.get_partial_shape()
    if shape.is_dynamic or prod(map(int, shape.to_shape())) < SMALL:
        return None
    return tuple(map(int, shape.to_shape())), np.dtype(port.get_element_type().to_dtype())


def _writable(value: Array) -> Array:
    """The array, or a copy of one that is read-only, whose memory OpenVINO does not share."""
    return value if value.flags.writeable else value.copy()
