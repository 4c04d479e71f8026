"""A program's graph through torch.compile (TorchInductor)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx

from bmgraph.errors import BackendError
from bmgraph.ir.program import Program
from bmgraph.utils.stored_tensor import is_too_large
from bmgraph.utils.torch_internals import packing_weights

CODES = (torch.int8, torch.uint8)
"""What weights of few bits are stored as."""

SizeKind = tuple[int, ...]
"""Of each size of the inputs 0, 1, or 2 for all that are larger, for which alone torch.compile makes one form."""


class CompiledGraph:
    """Runs the entry of a program in eval form by what torch.compile makes of it: one form for all sizes above 1, and others where
    a size is 0 or 1, each at the first call of that kind.

    Weights become constants of the forms, packed as products read them, which is a copy beside the program's. Not so where `exchanged`
    says that some of them change, or some are codes, which would be constants in floats.

    The form for the program's example is made at once: raises BackendError where torch.compile fails. Where it fails later, for another
    kind of sizes, calls of that kind run as the program does, and a UserWarning says why.
    """

    def __init__(self, program: Program, exchanged: bool) -> None:
        tensors = [*program.parameters.values(), *program.buffers.values()]
        if any(map(is_too_large, tensors)):
            raise BackendError(
                "Torch(torch_compile=True) needs weights in memory, and these stay in their files: leave it out"
            )
        module = program.module()
        assert isinstance(module, fx.GraphModule)
        self._module = module
        self.kept = "deltas change" if exchanged else ""
        if any(tensor.dtype in CODES for tensor in tensors):
            self.kept = "codes stay codes"
        self._forms: dict[SizeKind, Callable[..., Any]] = {}
        self._bytes = sum(tensor.nbytes for tensor in tensors)
        names = [spec.name for spec in program.inputs]
        if program.example and all(name in program.example for name in names):
            self._compile([program.example[name].to(program.device) for name in names])

    def summary(self) -> str:
        """What became of the weights, in a sentence."""
        copied = f"weights are packed, a copy of up to {self._bytes / 1e6:,.1f} MB beside the program's"
        return f"torch.compile: {f'weights are read as they are, since {self.kept}' if self.kept else copied}"

    def __call__(self, *values: torch.Tensor) -> Sequence[torch.Tensor]:
        form = self._forms.get(_kind(values))
        if form is not None:
            with self._packing():  # torch.compile may make another one of it, for equal sizes that differ now
                return form(*values)  # type: ignore[no-any-return]
        try:
            return self._compile(values)
        except BackendError as error:
            warnings.warn(str(error), stacklevel=2)
            self._forms[_kind(values)] = self._module
            return self._module(*values)  # type: ignore[no-any-return]

    def _compile(self, values: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Make the form for values of such sizes; what it gives."""
        module = fx.GraphModule(self._module, self._module.graph)  # what is made of it is kept apart
        form = torch.compile(module, fullgraph=True, dynamic=True)
        try:
            with torch.no_grad(), self._packing():
                found: Sequence[torch.Tensor] = form(*values)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BackendError(
                f"Torch(torch_compile=True): torch.compile fails, so leave it out: {line[:300]}"
            ) from error
        self._forms[_kind(values)] = form
        return found

    def _packing(self) -> AbstractContextManager[None]:
        return nullcontext() if self.kept else packing_weights()


def _kind(values: Sequence[torch.Tensor]) -> SizeKind:
    return tuple(min(size, 2) for value in values for size in value.shape)
