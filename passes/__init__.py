"""The passes of bmgraph, one rewrite per file; `PASSES` is the table of their names."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from bmgraph.errors import InputError

if TYPE_CHECKING:
    from bmgraph.pass_manager.pass_base import Pass
    from bmgraph.passes.cast import Cast as Cast
    from bmgraph.passes.class_rows import ClassRows as ClassRows
    from bmgraph.passes.deltas.adapter import Adapter as Adapter
    from bmgraph.passes.deltas.bitfit import BitFit as BitFit
    from bmgraph.passes.deltas.compacter import Compacter as Compacter
    from bmgraph.passes.deltas.dora import DoRA as DoRA
    from bmgraph.passes.deltas.ia3 import IA3 as IA3
    from bmgraph.passes.deltas.low_rank_adapter import LowRankAdapter as LowRankAdapter
    from bmgraph.passes.deltas.parallel_adapter import ParallelAdapter as ParallelAdapter
    from bmgraph.passes.deltas.prefix import Prefix as Prefix
    from bmgraph.passes.deltas.vera import VeRA as VeRA
    from bmgraph.passes.detach import Detach as Detach
    from bmgraph.passes.distill.distill import Distill as Distill
    from bmgraph.passes.fit.fit import Fit as Fit
    from bmgraph.passes.freeze import Freeze as Freeze
    from bmgraph.passes.kvcache.kvcache import KVCache as KVCache
    from bmgraph.passes.load_delta import LoadDelta as LoadDelta
    from bmgraph.passes.lora import LoRA as LoRA
    from bmgraph.passes.merge_deltas import Merge as Merge
    from bmgraph.passes.moefy.moefy import MoEfy as MoEfy
    from bmgraph.passes.offload.offload import Offload as Offload
    from bmgraph.passes.parallel_head import ParallelHead as ParallelHead
    from bmgraph.passes.per_row_deltas import Deltas as Deltas
    from bmgraph.passes.prune.prune import Prune as Prune
    from bmgraph.passes.qat.qat import QAT as QAT
    from bmgraph.passes.qat.store_codes import StoreCodes as StoreCodes
    from bmgraph.passes.quantize.quantize import Quantize as Quantize
    from bmgraph.passes.relufy import Relufy as Relufy
    from bmgraph.passes.remat.remat import Remat as Remat
    from bmgraph.passes.rotate.rotate import Rotate as Rotate
    from bmgraph.passes.shrink.l0 import L0 as L0
    from bmgraph.passes.shrink.shrink import Shrink as Shrink
    from bmgraph.passes.smooth import Smooth as Smooth
    from bmgraph.passes.soft_prompt import SoftPrompt as SoftPrompt
    from bmgraph.passes.soft_tokens import SoftTokens as SoftTokens
    from bmgraph.passes.split_outliers import SplitOutliers as SplitOutliers
    from bmgraph.passes.stream import Stream as Stream
    from bmgraph.passes.weighted_delta import WeightedDelta as WeightedDelta
    from bmgraph.passes.zero.zero import ZeRO as ZeRO

PASSES: dict[str, str] = {
    "Adapter": "bmgraph.passes.deltas.adapter",
    "BitFit": "bmgraph.passes.deltas.bitfit",
    "Cast": "bmgraph.passes.cast",
    "ClassRows": "bmgraph.passes.class_rows",
    "Compacter": "bmgraph.passes.deltas.compacter",
    "Deltas": "bmgraph.passes.per_row_deltas",
    "Detach": "bmgraph.passes.detach",
    "Distill": "bmgraph.passes.distill.distill",
    "DoRA": "bmgraph.passes.deltas.dora",
    "Fit": "bmgraph.passes.fit.fit",
    "Freeze": "bmgraph.passes.freeze",
    "IA3": "bmgraph.passes.deltas.ia3",
    "KVCache": "bmgraph.passes.kvcache.kvcache",
    "L0": "bmgraph.passes.shrink.l0",
    "LoadDelta": "bmgraph.passes.load_delta",
    "LoRA": "bmgraph.passes.lora",
    "LowRankAdapter": "bmgraph.passes.deltas.low_rank_adapter",
    "Merge": "bmgraph.passes.merge_deltas",
    "MoEfy": "bmgraph.passes.moefy.moefy",
    "Offload": "bmgraph.passes.offload.offload",
    "ParallelAdapter": "bmgraph.passes.deltas.parallel_adapter",
    "ParallelHead": "bmgraph.passes.parallel_head",
    "Prefix": "bmgraph.passes.deltas.prefix",
    "Prune": "bmgraph.passes.prune.prune",
    "QAT": "bmgraph.passes.qat.qat",
    "Quantize": "bmgraph.passes.quantize.quantize",
    "Relufy": "bmgraph.passes.relufy",
    "Remat": "bmgraph.passes.remat.remat",
    "Rotate": "bmgraph.passes.rotate.rotate",
    "Shrink": "bmgraph.passes.shrink.shrink",
    "Smooth": "bmgraph.passes.smooth",
    "SoftPrompt": "bmgraph.passes.soft_prompt",
    "SoftTokens": "bmgraph.passes.soft_tokens",
    "SplitOutliers": "bmgraph.passes.split_outliers",
    "StoreCodes": "bmgraph.passes.qat.store_codes",
    "Stream": "bmgraph.passes.stream",
    "VeRA": "bmgraph.passes.deltas.vera",
    "WeightedDelta": "bmgraph.passes.weighted_delta",
    "ZeRO": "bmgraph.passes.zero.zero",
}
"""Class name of a pass -> the module that defines it."""

ENTRY_POINTS = "bmgraph.passes"
"""The entry-point group in which other packages register passes: `name = module:Class`."""

__all__ = ["ENTRY_POINTS", "PASSES", "known_passes", *sorted(PASSES)]


def known_passes() -> dict[str, type[Pass]]:
    """Every pass by its name in text: the built-in ones and those that installed packages register."""
    from importlib.metadata import entry_points

    from bmgraph.pass_manager.pass_base import ModelPass, StepPass
    from bmgraph.pass_manager.pass_spec import name_of

    kinds: list[type[Pass]] = [getattr(import_module(module), name) for name, module in PASSES.items()]
    for point in entry_points(group=ENTRY_POINTS):
        kind = point.load()
        if not (isinstance(kind, type) and issubclass(kind, (ModelPass, StepPass))):
            raise InputError(
                f"entry point {point.name!r} of {ENTRY_POINTS} is {point.value}, which is not a pass: "
                "name a class that derives from ModelPass or StepPass"
            )
        kinds.append(kind)
    return {name_of(kind): kind for kind in kinds}


def __getattr__(name: str) -> object:
    if name not in PASSES:
        raise AttributeError(f"module 'bmgraph.passes' has no attribute {name!r}")
    return getattr(import_module(PASSES[name]), name)
