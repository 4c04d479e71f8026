"""Profile an OpenVINO engine: microseconds per node that OpenVINO runs, by the ONNX node that it is named after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from bmgraph.runtime.arrays import feeds_of
from bmgraph.runtime.node_times import NodeTime, Profile, origins
from bmgraph.runtime.openvino.engine import OpenVinoEngine

_WARMUP = 2
"""Untimed calls before the timed ones."""


def profile(engine: OpenVinoEngine, batch: Mapping[str, torch.Tensor], runs: int = 10) -> Profile:
    """Time every node over `runs` calls on one batch, after two warm-up calls, in a model compiled with timers.

    A fused node has the name of one of those that it was made of. Raises InputError if the batch does not fit the engine.
    """
    feeds = engine.tables.narrowed(feeds_of(engine, batch))
    models = engine.compiled(replace(engine.settings, timed=True, cache=""))
    model = models.at(tuple(value.shape for value in feeds.values()))
    sums: dict[tuple[str, str], float] = {}
    for turn in range(_WARMUP + runs):
        model.run(feeds)
        for name, kind, microseconds in model.node_times() if turn >= _WARMUP else ():
            sums[name, kind] = sums.get((name, kind), 0.0) + microseconds / runs
    origin = origins(engine.files)
    return Profile(
        tuple(
            NodeTime(name, kind, *origin.get(name, ("added by OpenVINO", "OpenVINO")), spent)
            for (name, kind), spent in sums.items()
        )
    )
