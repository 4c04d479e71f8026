"""One model that OpenVINO has compiled, and the requests that run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.openvino.library import import_openvino
from bmgraph.runtime.ort.output_buffers import Buffers

SMALL = 2**17
"""Below this many elements an output is copied; above, the model writes it where the caller reads it."""


class CompiledModel:
    """One compiled model, and its requests that nobody uses; several threads may run it at a time.

    `names` are those of the inputs that `run` takes, in order; `tables` are the others.
    """

    def __init__(self, model: Any, names: Sequence[str], tables: Mapping[str, Array]) -> None:
        self._model, self._tables = model, tables
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
        request = self.taken()
        results = self.run_on(request, feeds)
        self.give_back(request)
        return results

    def taken(self) -> Any:
        """A request that nobody else uses until it is given back."""
        try:
            return self._idle.pop()
        except IndexError:
            return self.request()

    def give_back(self, request: Any) -> None:
        """Let others use a request."""
        self._idle.append(request)

    def request(self) -> Any:
        """A new request."""
        request = self._model.create_infer_request()
        for name, value in self._tables.items():
            place = _place(self._model.inputs, name)
            request.set_input_tensor(place, self._tensor(value, shared_memory=True))
        return request

    def run_on(self, request: Any, feeds: Mapping[str, Array]) -> list[Array]:
        """As `run`, on a request that was taken."""
        tensor = self._tensor
        given = [tensor(_sharable(value), shared_memory=True) for value in feeds.values()]
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
        return [
            bound[index] if index in bound else np.array(request.get_output_tensor(index).data)
            for index in range(len(self._outputs))
        ]


def _place(ports: Sequence[Any], name: str) -> int:
    return next(index for index, port in enumerate(ports) if name in port.get_names())


def _fixed_output(port: Any) -> tuple[tuple[int, ...], np.dtype[Any]] | None:
    """The shape and type of a large output, which the model writes into memory of ours; None for another."""
    shape = port.get_partial_shape()
    if shape.is_dynamic or prod(map(int, shape.to_shape())) < SMALL:
        return None
    return tuple(map(int, shape.to_shape())), np.dtype(port.get_element_type().to_dtype())


def _sharable(value: Array) -> Array:
    """The array, or a copy of one that is read-only or not contiguous, whose memory OpenVINO does not share."""
    return value if value.flags.writeable and value.flags.c_contiguous else value.copy()
