"""Profile an engine: microseconds per node, grouped by operator, site and the pass that made the node."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bmgraph.runtime.ort.engine import OrtEngine, feeds_of

if TYPE_CHECKING:
    from rich.table import Table

SITE, PASS = "bmgraph.site", "bmgraph.pass"
"""Keys of the metadata of an ONNX node: its site, and the pass that made it."""

_WARMUP = 2
"""Untimed calls before the timed ones."""


@dataclass(frozen=True)
class NodeTime:
    """The mean time that one call of an engine spends in a node, in microseconds."""

    node: str
    operator: str
    site: str
    made_by: str
    microseconds: float


@dataclass(frozen=True)
class Profile:
    """The time of every node of an engine."""

    nodes: tuple[NodeTime, ...]

    def by(self, key: str) -> dict[str, float]:
        """Microseconds per call, summed by "operator", "site" or "made_by", largest first."""
        sums: dict[str, float] = {}
        for item in self.nodes:
            name = str(getattr(item, key))
            sums[name] = sums.get(name, 0.0) + item.microseconds
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def as_json(self) -> dict[str, dict[str, float]]:
        """The sums by each key, in microseconds."""
        return {key: self.by(key) for key in ("operator", "site", "made_by")}

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title="time by operator and the pass that made it", title_justify="left")
        for name in ("operator", "made by", "ms", "share"):
            table.add_column(name, justify="right" if name in ("ms", "share") else "left")
        sums: dict[tuple[str, str], float] = {}
        for item in self.nodes:
            key = (item.operator, item.made_by)
            sums[key] = sums.get(key, 0.0) + item.microseconds
        total = sum(sums.values()) or 1.0
        for (operator, made_by), time in sorted(sums.items(), key=lambda item: -item[1])[:20]:
            table.add_row(operator, made_by, f"{time / 1e3:.2f}", f"{time / total:.0%}")
        return table


def profile(engine: OrtEngine, batch: Mapping[str, torch.Tensor], runs: int = 10) -> Profile:
    """Time every node over `runs` calls on one batch, after two warm-up calls, in a separate session with profiling on.

    Raises InputError if the batch does not fit the engine.
    """
    import onnx

    feeds = feeds_of(engine, batch)
    with tempfile.TemporaryDirectory() as folder:
        session = engine.files.session(engine.providers, engine.threads, profile=str(Path(folder) / "p"))
        names = [spec.name for spec in engine.outputs]
        for _ in range(runs + _WARMUP):
            session.run(names, {**feeds, **engine.tables.values})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    model = onnx.ModelProto.FromString(bytes(engine.files.opened[engine.files.model].read()))
    origin = {node.name: {item.key: item.value for item in node.metadata_props} for node in model.graph.node}
    durations: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
            durations.setdefault(key, []).append(float(event["dur"]))
    return Profile(
        tuple(
            NodeTime(
                node, operator, origin.get(node, {}).get(SITE, "added by ONNX Runtime"),
                origin.get(node, {}).get(PASS, "ONNX Runtime"), sum(times[_WARMUP:]) / max(1, len(times) - _WARMUP),
            )
            for (node, operator), times in durations.items()
        )
    )  # fmt: skip
