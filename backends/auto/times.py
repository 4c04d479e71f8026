"""Times engines in turn, on what they are for."""

from __future__ import annotations

from collections.abc import Mapping

from bmgraph.backends.auto.generation_trial import generations
from bmgraph.benchmarking import Comparison, benchmark
from bmgraph.runtime.engine_base import Engine

BUDGET = 6.0
"""About how many seconds all timed runs take together."""

FEWEST, MOST = 7, 41
"""Timed runs of each engine."""


def times_in_turn(engines: Mapping[str, Engine]) -> tuple[Comparison, int]:
    """The times of engines on the example of the first, in turn; of engines that generate, while they do: then also the number of new
    tokens behind each prompt, else 0."""
    names = list(engines)
    asked = generations(engines)
    timed, batch, new = asked or (engines, engines[names[0]].example, 0)
    trial = benchmark(timed, batch, runs=1, warmup=1)
    spent = sum(map(trial.median, names)) / 1e3
    found = benchmark(timed, batch, runs=max(FEWEST, min(MOST, int(BUDGET / max(spent, 1e-6)))), warmup=1)
    return found, new
