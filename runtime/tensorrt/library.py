"""The vendor's library: the full one where it is installed, else the one for consumer GPUs, which builds without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from bmgraph.errors import BackendError

LIBRARIES = ("tensorrt", "tensorrt_rtx")
"""Modules with one interface, the preferred first."""


def import_tensorrt(names: Sequence[str] = LIBRARIES) -> Any:
    """The first of the modules that is there; raises BackendError where none is."""
    for name in names:
        try:
            return import_module(name)
        except (ImportError, OSError):  # a module without its libraries raises the latter
            continue
    packages = " or ".join(name.replace("_", "-") for name in names)
    raise BackendError(f'{packages} is not installed: pip install -e ".[engines]"')


def new_log(trt: Any) -> Any:
    """A logger for the library that keeps the errors, in `errors`, and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(text.split()))

    return Log()
