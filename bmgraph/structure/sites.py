"""What can be found in a model: sites, and the structure that holds them all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Part = tuple[str, int | None, int | None]
"""The parameter of a linear, and the range of its outputs that is meant; None, None for all of them."""


@dataclass(frozen=True)
class Linear:
    """A product with a weight: `site` is the weight's parameter name, `uses` the nodes that multiply with it."""

    site: str
    path: str
    inputs: int
    outputs: int
    transposed: bool
    uses: tuple[str, ...]


@dataclass(frozen=True)
class Attention:
    """Queries, keys, values and the output projection (empty where there is none) around one attention node."""

    path: str
    node: str
    q: Part
    k: Part
    v: Part
    o: str
    heads: int
    kv_heads: int
    head_size: int
    causal: bool
    cross: bool


@dataclass(frozen=True)
class FeedForward:
    """up -> activation -> down; gated: (activation(gate) * up) -> down. Where gate and up are one matrix, both name it."""

    path: str
    up: str
    down: str
    gate: str
    activation: str
    size: int

    @property
    def gated(self) -> bool:
        """Whether the activation is multiplied with a second projection."""
        return bool(self.gate)


@dataclass(frozen=True)
class Norm:
    """A normalisation; `site` is its weight, or its node where it has none."""

    site: str
    path: str
    kind: str


@dataclass(frozen=True)
class Embedding:
    """A table that is looked up."""

    site: str
    path: str
    rows: int
    size: int


@dataclass(frozen=True)
class Experts:
    """Matrices of several experts in one parameter [experts, ...]."""

    site: str
    path: str
    experts: int


@dataclass(frozen=True)
class Layers:
    """A run of equal blocks: `count` times the paths of one block's attentions and feed-forwards."""

    count: int
    blocks: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Structure:
    """All sites of a program, in the order in which they are computed."""

    linears: tuple[Linear, ...]
    attentions: tuple[Attention, ...]
    feedforwards: tuple[FeedForward, ...]
    norms: tuple[Norm, ...]
    embeddings: tuple[Embedding, ...]
    experts: tuple[Experts, ...]
    layers: tuple[Layers, ...]
    roles: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Parameter of a linear -> its roles, such as `attention.q` or `feedforward.up`."""

    def role(self, site: str) -> tuple[str, ...]:
        """The roles of a linear; a fused projection has several, one that is neither has none."""
        return self.roles.get(site, ())

    def table(self) -> Any:
        """What was found, as a rich table."""
        from rich.table import Table

        table = Table(title="structure", title_justify="left")
        for name in ("kind", "module", "what"):
            table.add_column(name, overflow="fold")
        for item in self.attentions:
            kind = "cross-attention" if item.cross else "causal attention" if item.causal else "attention"
            heads = f"{item.heads} heads" + (
                f", {item.kv_heads} of keys and values" if item.kv_heads != item.heads else ""
            )
            table.add_row(kind, item.path, f"{heads}, size {item.head_size}")
        for feed in self.feedforwards:
            table.add_row(
                "gated feed-forward" if feed.gated else "feed-forward",
                feed.path,
                f"{feed.activation}, size {feed.size}",
            )
        for many in self.experts:
            table.add_row("experts", many.path, f"{many.experts} experts")
        for norm in self.norms:
            table.add_row("norm", norm.path, norm.kind)
        for embedding in self.embeddings:
            table.add_row("embedding", embedding.path, f"{embedding.rows} x {embedding.size}")
        for layers in self.layers:
            table.add_row("layers", layers.blocks[0][0], f"{layers.count} equal blocks")
        return table

    def tree(self) -> Any:
        """The linears with their roles, as a rich tree along the module paths."""
        from rich.tree import Tree

        root = Tree("model")
        branches: dict[str, Any] = {"": root}
        for linear in self.linears:
            parts = linear.path.split(".") if linear.path else []
            for depth in range(1, len(parts) + 1):
                path = ".".join(parts[:depth])
                if path not in branches:
                    branches[path] = branches[".".join(parts[: depth - 1])].add(parts[depth - 1])
            roles = ", ".join(self.role(linear.site))
            branches[linear.path].add(f"{linear.inputs} -> {linear.outputs} {roles}")
        return root
