"""Import TensorRT: the full library if it is installed, else TensorRT for RTX, which builds engines without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from bmgraph.errors import BackendError

LIBRARIES = ("tensorrt", "tensorrt_rtx")
"""Modules with the same interface, the preferred one first."""


def import_tensorrt(names: Sequence[str] = LIBRARIES) -> ModuleType:
    """The first of the modules that can be imported; raises BackendError if none can."""
    for name in names:
        try:
            return import_module(name)
        except (ImportError, OSError):  # OSError: the module is there, its shared libraries are not
            continue
    packages = " or ".join(name.replace("_", "-") for name in names)
    raise BackendError(f'{packages} is not installed: pip install -e ".[engines]"')


def compiles_at_calls(trt: ModuleType) -> bool:
    """Whether the library compiles kernels at calls, and measures nothing while it builds (TensorRT for RTX)."""
    return hasattr(trt, "IRuntimeCache")


def new_log(trt: ModuleType) -> Any:
    """A logger for TensorRT that prints nothing and collects error messages in `errors`."""

    class Log(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(text.split()))

    return Log()
