"""bmgraph compiles big models: a PyTorch model, through ordered and verified passes, to an engine.

Names are loaded when they are used, so that a serving process loads neither the passes nor torch's compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_WHERE = {
    "BmgraphError": "bmgraph.errors",
    "PackedBatches": "bmgraph.utils.packing",
    "Pass": "bmgraph.pass_manager.pass_base",
    "Pipeline": "bmgraph.pipeline",
    "Program": "bmgraph.ir.program",
    "benchmark": "bmgraph.benchmarking",
    "capture": "bmgraph.frontend.capture",
    "capture_methods": "bmgraph.frontend.capture_methods",
    "compile": "bmgraph.compiler",
    "load": "bmgraph.loading",
    "plan": "bmgraph.planning",
    "replay": "bmgraph.replaying",
    "run_task": "bmgraph.runners.run_task",
}
"""Public name -> the module that defines it."""

__all__ = ["__version__", *sorted(_WHERE)]

if TYPE_CHECKING:
    from bmgraph.benchmarking import benchmark as benchmark
    from bmgraph.compiler import compile as compile
    from bmgraph.errors import BmgraphError as BmgraphError
    from bmgraph.frontend.capture import capture as capture
    from bmgraph.frontend.capture_methods import capture_methods as capture_methods
    from bmgraph.ir.program import Program as Program
    from bmgraph.loading import load as load
    from bmgraph.pass_manager.pass_base import Pass as Pass
    from bmgraph.pipeline import Pipeline as Pipeline
    from bmgraph.planning import plan as plan
    from bmgraph.replaying import replay as replay
    from bmgraph.runners.run_task import run_task as run_task
    from bmgraph.utils.packing import PackedBatches as PackedBatches


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'bmgraph' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value
