"""Code generation for each target: the built-in ones in the table `BACKENDS`, others by entry points."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, overload

from bmgraph.errors import InputError

if TYPE_CHECKING:
    from bmgraph.backends.auto.backend import Auto as Auto
    from bmgraph.backends.backend_base import Backend as Backend
    from bmgraph.backends.backend_base import Made
    from bmgraph.backends.onnx.backend import Onnx as Onnx
    from bmgraph.backends.openvino.backend import OpenVINO as OpenVINO
    from bmgraph.backends.tensorrt.backend import TensorRT as TensorRT
    from bmgraph.backends.torch.backend import Torch as Torch
    from bmgraph.runtime.engine_base import Engine
    from bmgraph.runtime.training.trainer import Trainer
    from bmgraph.training.loss_scale import LossScale as LossScale
    from bmgraph.training.lr_schedules import WSD as WSD
    from bmgraph.training.lr_schedules import Constant as Constant
    from bmgraph.training.lr_schedules import Cosine as Cosine
    from bmgraph.training.lr_schedules import Exponential as Exponential
    from bmgraph.training.lr_schedules import Linear as Linear
    from bmgraph.training.lr_schedules import Noam as Noam
    from bmgraph.training.optimizers import SGD as SGD
    from bmgraph.training.optimizers import AdamW as AdamW
    from bmgraph.training.optimizers import Lion as Lion

BACKENDS: dict[str, tuple[str, str]] = {
    "auto": ("bmgraph.backends.auto.backend", "Auto"),
    "onnx": ("bmgraph.backends.onnx.backend", "Onnx"),
    "openvino": ("bmgraph.backends.openvino.backend", "OpenVINO"),
    "tensorrt": ("bmgraph.backends.tensorrt.backend", "TensorRT"),
    "torch": ("bmgraph.backends.torch.backend", "Torch"),
}
"""Backend name -> the module and class of its configuration."""

ENTRY_POINTS = "bmgraph.backends"
"""The entry-point group in which other packages register backends: `name = module:Class`."""

OPTION_MODULES: dict[str, str] = {
    "AdamW": "bmgraph.training.optimizers",
    "Lion": "bmgraph.training.optimizers",
    "SGD": "bmgraph.training.optimizers",
    "Constant": "bmgraph.training.lr_schedules",
    "Cosine": "bmgraph.training.lr_schedules",
    "Exponential": "bmgraph.training.lr_schedules",
    "Linear": "bmgraph.training.lr_schedules",
    "LossScale": "bmgraph.training.loss_scale",
    "Noam": "bmgraph.training.lr_schedules",
    "WSD": "bmgraph.training.lr_schedules",
}
"""Optimizer, schedule or loss scale, re-exported for use in configurations -> the module that defines it."""

__all__ = [
    "BACKENDS", "ENTRY_POINTS", "SGD", "WSD", "AdamW", "Auto", "Constant", "Cosine", "Exponential", "Linear", "Lion", "Noam",
    "Onnx", "OpenVINO", "TensorRT", "Torch",
]  # fmt: skip


@overload
def resolve_backend(backend: str, package: str | None = None) -> Backend[Engine | Trainer]: ...


@overload
def resolve_backend(backend: Backend[Made], package: None = None) -> Backend[Made]: ...


def resolve_backend(backend: object, package: str | None = None) -> object:
    """The configuration of a backend, from its name or itself; raises InputError for anything else.

    With `package`, the one that this installed package registers under the name.
    """
    from bmgraph.backends.backend_base import Backend

    if isinstance(backend, str):
        return _class_of(backend, package)()
    if not isinstance(backend, Backend):
        raise InputError(
            f"backend={backend!r} is neither a name ({', '.join(_names())}) nor a backend's configuration, such as Onnx()"
        )
    return backend


def outside_packages(name: str) -> list[str]:
    """The installed packages that register a backend of a name; none is imported."""
    from importlib.metadata import entry_points

    from bmgraph.ops.outside import package_of

    return sorted({package_of(point) for point in entry_points(group=ENTRY_POINTS, name=name)})


def _class_of(name: str, package: str | None) -> type[Backend[Engine | Trainer]]:
    """The built-in backend of a name, or the one that an installed package registers."""
    from importlib.metadata import entry_points

    from bmgraph.backends.backend_base import Backend
    from bmgraph.ops.outside import package_of

    if name in BACKENDS and package is None:
        module, kind = BACKENDS[name]
        built_in: type[Backend[Engine | Trainer]] = getattr(import_module(module), kind)
        return built_in
    for point in entry_points(group=ENTRY_POINTS, name=name):
        if package is not None and package_of(point) != package:
            continue
        found = point.load()
        if not (isinstance(found, type) and issubclass(found, Backend) and found.name == name):
            raise InputError(
                f"entry point {name!r} of {ENTRY_POINTS} is {point.value}, which is not a backend of that name: "
                f"name a class that derives from Backend and whose name is {name!r}"
            )
        return found
    raise InputError(f"no backend is called {name!r}: choose one of {', '.join(_names())}")


def _names() -> list[str]:
    """The names of all backends, without importing any."""
    from importlib.metadata import entry_points

    return sorted({*BACKENDS, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def __getattr__(name: str) -> object:
    for module, class_name in BACKENDS.values():
        if name == class_name:
            return getattr(import_module(module), class_name)
    if name in OPTION_MODULES:
        return getattr(import_module(OPTION_MODULES[name]), name)
    raise AttributeError(f"module 'bmgraph.backends' has no attribute {name!r}")
