"""The configuration `Auto`: compile for each target that is installed, and keep the fastest engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import ClassVar, Self

import torch

from bmgraph.backends import BACKENDS, resolve_backend
from bmgraph.backends.auto.race import race
from bmgraph.backends.backend_base import Backend
from bmgraph.errors import BackendError, InputError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_manager import PassManager
from bmgraph.pass_manager.report import Report
from bmgraph.runtime.engine_base import Engine

LIBRARIES = {
    "onnx": ("onnxruntime",),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt_rtx"),
}
"""The backends that are tried, in this order, and the modules of which each needs one."""

Lower = Callable[[Backend[Engine]], Engine]
"""Takes the program through the passes to the engine of a backend."""


@dataclass(frozen=True)
class Auto(Backend[Engine]):
    """Compile for each backend that is installed, with the same passes, time the engines in turn on the example, and keep the
    fastest.

    among: names of backends; by default those that build engines for deployment. generate: give a decoder a KV cache. The
    report says by how much the engine is faster than the others, and why a backend was left out.

    Example:
        >>> from bmgraph.backends import Auto
        >>> Auto(among=("onnx",)).among
        ('onnx',)
    """

    name: ClassVar[str] = "auto"
    why_float: ClassVar[str] = "only engines of openvino keep one so, and it chooses among others too"

    among: tuple[str, ...] = tuple(LIBRARIES)
    generate: bool = False

    def __post_init__(self) -> None:
        known = [name for name in BACKENDS if name != self.name]
        for name in self.among:
            if name not in known:
                raise InputError(f"among={self.among!r}: {name!r} is none of {', '.join(known)}")
        if not self.among or len(set(self.among)) < len(self.among):
            raise InputError(f"among={self.among!r}: give one name or more, each once")

    @property
    def chooses(self) -> bool:
        """Whether `choose` makes the engine: each choice takes the program through the passes for its own target."""
        return True

    def generating(self) -> Self:
        """The same configuration, for engines that generate."""
        return replace(self, generate=True)

    def choose(self, lower: Lower) -> Engine:
        """The fastest of the engines that `lower` makes; raises BackendError, with all reasons, where it makes none."""
        return race({name: partial(self._of, name, lower) for name in self.among})

    def build(self, program: Program, report: Report, manager: PassManager | None = None) -> Engine:
        """The fastest engine of a program as it is; raises BackendError where no backend builds one."""

        def lower(config: Backend[Engine]) -> Engine:
            return config.build(program, Report(records=report.records), manager)

        return self.choose(lower)

    def _of(self, name: str, lower: Lower) -> Engine:
        """The engine of one backend; raises BackendError where it is not installed."""
        modules = LIBRARIES.get(name, ())
        if modules and not any(map(find_spec, modules)):
            raise BackendError(f"{' or '.join(modules)} is not installed")
        if name == "tensorrt" and not torch.cuda.is_available():
            raise BackendError("this machine has no CUDA GPU to time its engine on")
        config: Backend[Engine] = resolve_backend(name)  # type: ignore[assignment]  # none of them trains
        return lower(config.generating() if self.generate else config)
