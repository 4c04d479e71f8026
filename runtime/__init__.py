"""What a user holds after compiling: engines, and later trainers; loads neither passes nor torch's compiler."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bmgraph.runtime.engine import Engine as Engine
    from bmgraph.runtime.tensorrt_engine import TensorRTEngine as TensorRTEngine

HELD = {"Engine": "bmgraph.runtime.engine", "TensorRTEngine": "bmgraph.runtime.tensorrt_engine"}
"""Class -> the module that defines it."""

__all__ = ["HELD", *sorted(HELD)]


def __getattr__(name: str) -> Any:
    if name in HELD:
        return getattr(import_module(HELD[name]), name)
    raise AttributeError(f"module 'bmgraph.runtime' has no attribute {name!r}")
