"""Counts and times of the server, as text that Prometheus reads."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the classes of times."""

COUNTERS = {
    "requests_total": "Requests that were answered, by path and status.",
    "prompt_tokens_total": "Tokens of the prompts of answers, by model.",
    "cached_prompt_tokens_total": "Those of them that were not read again, since another text began with them.",
    "new_tokens_total": "Tokens that were produced, by model.",
    "answers_total": "Answers by why they ended.",
}
HISTOGRAMS = {
    "first_token_seconds": "From a request's arrival to its first token.",
    "token_seconds": "Mean time between two tokens of an answer.",
    "request_seconds": "From a request's arrival to its end.",
}

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counters and histograms. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, Labels], float] = defaultdict(float)
        self._times: dict[str, list[int]] = {name: [0] * (len(SECONDS) + 1) for name in HISTOGRAMS}
        self._sums: dict[str, float] = dict.fromkeys(HISTOGRAMS, 0.0)

    def add(self, name: str, count: float = 1, **labels: str) -> None:
        """Count up."""
        with self._lock:
            self._counts[name, tuple(sorted(labels.items()))] += count

    def observe(self, name: str, seconds: float) -> None:
        """Note a time."""
        with self._lock:
            self._times[name][bisect_left(SECONDS, seconds)] += 1
            self._sums[name] += seconds

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """All of it; `gauges` are values of now with what they mean."""
        lines: list[str] = []
        with self._lock:
            for name, meaning in COUNTERS.items():
                lines += _head(name, meaning, "counter")
                lines += [
                    f"bmgraph_{name}{_labels(labels)} {value:g}"
                    for (other, labels), value in sorted(self._counts.items())
                    if other == name
                ]
            for name, meaning in HISTOGRAMS.items():
                lines += _head(name, meaning, "histogram")
                lines += _histogram(name, self._times[name], self._sums[name])
        for name, (meaning, value) in gauges.items():
            lines += [*_head(name, meaning, "gauge"), f"bmgraph_{name} {value:g}"]
        return "\n".join(lines) + "\n"


def _head(name: str, meaning: str, kind: str) -> list[str]:
    return [f"# HELP bmgraph_{name} {meaning}", f"# TYPE bmgraph_{name} {kind}"]


def _histogram(name: str, counts: Sequence[int], total: float) -> list[str]:
    lines, below = [], 0
    for bound, count in zip((*map(str, SECONDS), "+Inf"), counts):
        below += count
        lines.append(f'bmgraph_{name}_bucket{{le="{bound}"}} {below}')
    return [*lines, f"bmgraph_{name}_sum {total:.6f}", f"bmgraph_{name}_count {below}"]


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    texts = (
        f'{name}="' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
        for name, value in labels
    )
    return "{" + ",".join(texts) + "}"
