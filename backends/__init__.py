"""Lowering, one target each; `BACKENDS` is the one table of their names."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bmgraph.backends.onnx.backend import Onnx as Onnx
    from bmgraph.backends.tensorrt.backend import TensorRT as TensorRT

BACKENDS: dict[str, tuple[str, str]] = {
    "onnx": ("bmgraph.backends.onnx.backend", "Onnx"),
    "tensorrt": ("bmgraph.backends.tensorrt.backend", "TensorRT"),
}
"""Name of a backend -> the module and class of its configuration."""

__all__ = ["BACKENDS", "Onnx", "TensorRT"]


def __getattr__(name: str) -> Any:
    for module, kind in BACKENDS.values():
        if name == kind:
            return getattr(import_module(module), kind)
    raise AttributeError(f"module 'bmgraph.backends' has no attribute {name!r}")
