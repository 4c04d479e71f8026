"""Engines and trainers, which `compile` and `load` return; importing this loads neither passes nor torch's compiler."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bmgraph.runtime.engine_base import Engine as Engine
    from bmgraph.runtime.generation.batching.options import Batching as Batching
    from bmgraph.runtime.openvino.engine import OpenVinoEngine as OpenVinoEngine
    from bmgraph.runtime.ort.engine import OrtEngine as OrtEngine
    from bmgraph.runtime.tensorrt.engine import TensorRTEngine as TensorRTEngine
    from bmgraph.runtime.torch.engine import TorchEngine as TorchEngine
    from bmgraph.runtime.training.trainer import StepResult as StepResult
    from bmgraph.runtime.training.trainer import Trainer as Trainer

CLASSES = {
    "Batching": "bmgraph.runtime.generation.batching.options",
    "Engine": "bmgraph.runtime.engine_base",
    "OpenVinoEngine": "bmgraph.runtime.openvino.engine",
    "OrtEngine": "bmgraph.runtime.ort.engine",
    "StepResult": "bmgraph.runtime.training.trainer",
    "TensorRTEngine": "bmgraph.runtime.tensorrt.engine",
    "TorchEngine": "bmgraph.runtime.torch.engine",
    "Trainer": "bmgraph.runtime.training.trainer",
}
"""Public class -> the module that defines it."""

__all__ = ["CLASSES", *sorted(CLASSES)]


def __getattr__(name: str) -> object:
    if name not in CLASSES:
        raise AttributeError(f"module 'bmgraph.runtime' has no attribute {name!r}")
    return getattr(import_module(CLASSES[name]), name)
