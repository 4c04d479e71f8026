"""Run a TensorRT plan on torch tensors, on torch's current stream."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bmgraph.errors import BackendError
from bmgraph.runtime.tensorrt.kernel_cache import KernelCache
from bmgraph.runtime.tensorrt.library import import_tensorrt, new_log
from bmgraph.runtime.tensorrt.refit import set_weights


class PlanSession:
    """A deserialized plan, the contents of the file `where`: native code, so the caller vouches for it.

    `kernels` keeps what is compiled at calls, where the library compiles then. Raises BackendError if TensorRT rejects the plan.
    """

    def __init__(
        self, where: Path, plan: bytearray, library: str, kernels: KernelCache | None = None
    ) -> None:
        self._trt = import_tensorrt((library,))
        self._log = new_log(self._trt)
        self._runtime = self._trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BackendError(f"{library} rejects {where}: {self._first_error()}")
        self._kernels = kernels
        self._context = (
            self._engine.create_execution_context() if kernels is None else kernels.context(self._engine)
        )
        self._placeholder = torch.empty(1, device="cuda")

    def run(
        self,
        batch: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.dtype],
        placed: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The outputs by name, on the GPU, those in `placed` in memory that is given; inputs may lie on any device. Raises BackendError
        if the engine fails."""
        given = placed or {}
        bound = {name: self._bind_input(name, value) for name, value in batch.items()}
        results = {name: self._bind_output(name, dtype, given.get(name)) for name, dtype in outputs.items()}
        stream = torch.cuda.current_stream()
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise BackendError(f"the engine failed on {_shapes(bound)}: {self._first_error()}")
        stream.synchronize()  # `bound` must live until the kernels have read it
        if self._kernels is not None:
            self._kernels.called()
        return results

    def refit(self, values: Mapping[str, torch.Tensor], changed: set[str]) -> bytes:
        """Exchange weights, of which those that are `changed` differ from what the plan holds; returns the plan with them.

        Raises BackendError if TensorRT refuses, and then some may have been exchanged.
        """
        torch.cuda.synchronize()
        refitter = self._trt.Refitter(self._engine, self._log)
        problem = set_weights(self._trt, refitter, values, changed)
        if problem:
            raise BackendError(
                f"TensorRT exchanges no weights: {problem} ({self._first_error()}): compile anew"
            )
        return bytes(self._engine.serialize())

    def layers(self) -> dict[str, object]:
        """What TensorRT's inspector reports on the engine's layers."""
        inspector = self._engine.create_engine_inspector()
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        report: dict[str, Any] = json.loads(text)
        return report

    def _bind_input(self, name: str, value: torch.Tensor) -> torch.Tensor:
        on_host = self._engine.get_tensor_location(name) == self._trt.TensorLocation.HOST
        placed = value.to("cpu" if on_host else "cuda").contiguous()
        if not self._context.set_input_shape(name, tuple(placed.shape)):
            raise BackendError(
                f"input {name!r} cannot have shape {list(placed.shape)}: {self._first_error()}"
            )
        self._context.set_tensor_address(name, self._address(placed))
        return placed

    def _bind_output(self, name: str, dtype: torch.dtype, placed: torch.Tensor | None) -> torch.Tensor:
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise BackendError(
                f"output {name!r} has shape {list(shape)}, whose size depends on values: TensorRT engines need shapes that "
                "follow from those of the inputs"
            )
        output = torch.empty(shape, dtype=dtype, device="cuda") if placed is None else placed
        self._context.set_tensor_address(name, self._address(output))
        return output

    def _address(self, tensor: torch.Tensor) -> int:
        """The tensor's address; a dummy one for an empty tensor (a cache before its first token), as TensorRT rejects 0."""
        return tensor.data_ptr() or self._placeholder.data_ptr()

    def _first_error(self) -> str:
        return str(self._log.errors[0]) if self._log.errors else "TensorRT gave no reason"


def _shapes(batch: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in batch.items())
