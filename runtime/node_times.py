"""Times of the nodes of an engine, grouped by operator, site and the pass that made the node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bmgraph.runtime.ort.model_files import ModelFiles

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnx import GraphProto, NodeProto
    from rich.table import Table

SITE, PASS = "bmgraph.site", "bmgraph.pass"
"""Keys of the metadata of an ONNX node: its site, and the pass that made it."""


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


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of a graph, in order, with those of the branches of each before it."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_nodes(attribute.g)
        yield node


def origins(files: ModelFiles) -> dict[str, tuple[str, str]]:
    """The site of each node of a model, by its name, and the pass that made it."""
    import onnx

    model = onnx.ModelProto.FromString(bytes(files.opened[files.model].read()))
    found = {}
    for node in all_nodes(model.graph):
        said = {item.key: item.value for item in node.metadata_props}
        if SITE in said:
            found[node.name] = said[SITE], said.get(PASS, "")
    return found
