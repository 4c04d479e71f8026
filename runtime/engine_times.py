"""Times an engine beside the program that the passes began with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from bmgraph.ir.joined_graphs import join
from bmgraph.ir.omitted_inputs import inputs_of
from bmgraph.ir.program import Program
from bmgraph.runtime.engine_base import Engine
from bmgraph.verify.reference_outputs import Batch, comparison_batch, fitted

MOST = 5
"""Runs of each."""

ENOUGH = 0.05
"""Seconds of runs after which no more are made: compilation must not wait for figures."""


def measure_times(engine: Engine, first: Program, batch: Batch, calibration: object) -> None:
    """Record in the engine's report what a call of the program before all passes takes on torch, and one of the engine: medians of
    runs in turn, on the same batch. Both have run on it before.

    Nothing is recorded where the engine takes other inputs than the program did, or the program does not fit in memory.
    """
    if first.feeders():
        batch = comparison_batch(join(first)[0], calibration)
    names = {spec.name for spec in inputs_of([engine])}
    known = {spec.name for spec in inputs_of([first])}
    if not names <= known or not known <= batch.keys() or not first.fits_in_memory:
        return
    given = fitted(batch, inputs_of([first]))
    calls: tuple[Callable[[], object], Callable[[], object]] = (
        lambda: first(**given),
        lambda: engine(**{name: value for name, value in batch.items() if name in names}),
    )
    seconds: tuple[list[float], list[float]] = ([], [])
    while len(seconds[0]) < MOST and sum(map(sum, seconds)) < ENOUGH:
        for call, spent in zip(calls, seconds):
            begin = time.perf_counter()
            call()
            if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.synchronize()
            spent.append(time.perf_counter() - begin)
    report = engine.report
    report.milliseconds_before, report.milliseconds = (1e3 * statistics.median(item) for item in seconds)
    report.timed = f"{'x'.join(map(str, next(iter(given.values())).shape))}, {len(seconds[0])} runs of each"
