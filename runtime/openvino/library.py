"""Import OpenVINO without its telemetry, and ask it what this machine's CPU computes in."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

from bmgraph.errors import BackendError

TELEMETRY = "openvino_telemetry"
"""The package that tells the makers of OpenVINO, over the network, that it was imported and used."""

DEVICE = "CPU"

_FRONTEND_FAILURES = (
    "GeneralFailure", "InitializationFailure", "NotImplementedFailure", "OpConversionFailure", "OpValidationFailure",
)  # fmt: skip

_importing = threading.Lock()


def import_openvino() -> ModuleType:
    """The openvino module; raises BackendError if it is not installed.

    While it is imported here for the first time its telemetry package cannot be found, so that nothing is sent, then or later.
    """
    with _importing:
        try:
            if "openvino" not in sys.modules:
                with _without_telemetry():
                    import openvino
            import openvino
        except ImportError as error:
            raise BackendError('OpenVINO is not installed: pip install -e ".[openvino]"') from error
    module: ModuleType = openvino
    return module


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Within it the telemetry package cannot be imported; who has imported it keeps it."""
    names = [name for name in sys.modules if name == TELEMETRY or name.startswith(f"{TELEMETRY}.")]
    kept = {name: sys.modules.pop(name) for name in names}
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # what an import of it then finds
    try:
        yield
    finally:
        del sys.modules[TELEMETRY]
        sys.modules.update(kept)


@cache
def core() -> Any:
    """OpenVINO's Core, one for the process: each would load the plugins of its own."""
    return import_openvino().Core()


@cache
def onnx_frontend() -> Any:
    """OpenVINO's reader of ONNX alone: `Core.read_model` would try those of all formats on a file, whatever it is called."""
    return import_openvino().frontend.FrontEndManager().load_by_framework("onnx")


@cache
def failures() -> tuple[type[Exception], ...]:
    """The exceptions that OpenVINO raises, which have no base class of their own."""
    frontend = import_openvino().frontend
    named = [getattr(frontend, name) for name in _FRONTEND_FAILURES if hasattr(frontend, name)]
    return (RuntimeError, ValueError, TypeError, IndexError, *named)


def library_version() -> str:
    """The version of the installed OpenVINO, such as `2026.4.1`, without the number of its build."""
    return str(import_openvino().__version__).split("-")[0]


def has_bf16() -> bool:
    """Whether this machine's CPU has instructions for bf16, which OpenVINO then uses."""
    return "BF16" in core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")


def first_line(error: BaseException) -> str:
    """What OpenVINO says of a failure, in one line: the last that is no place in its own source."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return (told[-1] if told else next(filter(None, lines), type(error).__name__))[:400]
