"""What a user holds after compiling: engines and trainers; loads neither passes nor torch's compiler."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bmgraph.runtime.engine import Engine as Engine
    from bmgraph.runtime.tensorrt_engine import TensorRTEngine as TensorRTEngine
    from bmgraph.runtime.torch_engine import TorchEngine as TorchEngine
    from bmgraph.runtime.trainer import StepResult as StepResult
    from bmgraph.runtime.trainer import Trainer as Trainer

HELD = {
    "Engine": "bmgraph.runtime.engine",
    "StepResult": "bmgraph.runtime.trainer",
    "TensorRTEngine": "bmgraph.runtime.tensorrt_engine",
    "TorchEngine": "bmgraph.runtime.torch_engine",
    "Trainer": "bmgraph.runtime.trainer",
}
"""Public name -> the module that defines it."""

__all__ = ["HELD", *sorted(HELD)]


def __getattr__(name: str) -> Any:
    if name not in HELD:
        raise AttributeError(f"module 'bmgraph.runtime' has no attribute {name!r}")
    return getattr(import_module(HELD[name]), name)
