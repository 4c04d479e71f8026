"""Profile an ONNX Runtime engine: microseconds per node, grouped by operator, site and the pass that made the node."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from bmgraph.runtime.arrays import feeds_of
from bmgraph.runtime.node_times import NodeTime, Profile, origins
from bmgraph.runtime.ort.engine import OrtEngine
from bmgraph.runtime.ort.rows_together import cached_positions, of_rows, rows_together

_WARMUP = 2
"""Untimed calls before the timed ones."""


def profile(engine: OrtEngine, batch: Mapping[str, torch.Tensor], runs: int = 10) -> Profile:
    """Time every node over `runs` calls on one batch, after two warm-up calls, in a separate session with profiling on.

    Of a batch whose rows do not run together, the first ones that do are timed.

    Raises InputError if the batch does not fit the engine.
    """
    feeds = feeds_of(engine, batch)
    decoder = engine.decoder()
    if decoder is not None:
        cache = decoder.cache
        part, rows = rows_together(cache, feeds, cached_positions(cache, feeds))[0], cache.tokens.shape[0]
        feeds = {spec.name: of_rows(spec, feeds[spec.name], rows, part) for spec in engine.inputs}
    with tempfile.TemporaryDirectory() as folder:
        session = engine.files.session(engine.providers, engine.threads, profile=str(Path(folder) / "p"))
        names = [spec.name for spec in engine.outputs]
        for _ in range(runs + _WARMUP):
            session.run(names, {**feeds, **engine.tables.values})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    origin = origins(engine.files)
    durations: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
            durations.setdefault(key, []).append(float(event["dur"]))
    return Profile(
        tuple(
            NodeTime(
                node, operator, *origin.get(node, ("added by ONNX Runtime", "ONNX Runtime")),
                sum(times[_WARMUP:]) / max(1, len(times) - _WARMUP),
            )
            for (node, operator), times in durations.items()
        )
    )  # fmt: skip
