"""Code generation for each target (ONNX Runtime, TensorRT, torch); the table `BACKENDS` names them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bmgraph.errors import InputError

if TYPE_CHECKING:
    from bmgraph.backends.onnx.backend import Onnx as Onnx
    from bmgraph.backends.tensorrt.backend import TensorRT as TensorRT
    from bmgraph.backends.torch.backend import Torch as Torch
    from bmgraph.training.lr_schedules import Constant as Constant
    from bmgraph.training.lr_schedules import Cosine as Cosine
    from bmgraph.training.lr_schedules import Linear as Linear
    from bmgraph.training.lr_schedules import Noam as Noam
    from bmgraph.training.optimizers import SGD as SGD
    from bmgraph.training.optimizers import AdamW as AdamW

BACKENDS: dict[str, tuple[str, str]] = {
    "onnx": ("bmgraph.backends.onnx.backend", "Onnx"),
    "tensorrt": ("bmgraph.backends.tensorrt.backend", "TensorRT"),
    "torch": ("bmgraph.backends.torch.backend", "Torch"),
}
"""Backend name -> the module and class of its configuration."""

OPTION_MODULES: dict[str, str] = {
    "AdamW": "bmgraph.training.optimizers",
    "SGD": "bmgraph.training.optimizers",
    "Constant": "bmgraph.training.lr_schedules",
    "Cosine": "bmgraph.training.lr_schedules",
    "Linear": "bmgraph.training.lr_schedules",
    "Noam": "bmgraph.training.lr_schedules",
}
"""Optimizer or schedule, re-exported for use in configurations -> the module that defines it."""

__all__ = ["BACKENDS", "SGD", "AdamW", "Constant", "Cosine", "Linear", "Noam", "Onnx", "TensorRT", "Torch"]


def resolve_backend(backend: Any) -> Any:
    """The configuration of a backend, from its name or itself; raises InputError for anything else."""
    if isinstance(backend, str):
        if backend not in BACKENDS:
            raise InputError(f"no backend is called {backend!r}: choose one of {', '.join(sorted(BACKENDS))}")
        module, kind = BACKENDS[backend]
        return getattr(import_module(module), kind)()
    if not hasattr(backend, "build") or not hasattr(backend, "stages"):
        raise InputError(
            f"backend={backend!r} is neither a name ({', '.join(sorted(BACKENDS))}) nor a backend's configuration"
        )
    return backend


def __getattr__(name: str) -> Any:
    for module, class_name in BACKENDS.values():
        if name == class_name:
            return getattr(import_module(module), class_name)
    if name in OPTION_MODULES:
        return getattr(import_module(OPTION_MODULES[name]), name)
    raise AttributeError(f"module 'bmgraph.backends' has no attribute {name!r}")
