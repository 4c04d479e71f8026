"""Feed-forwards: a linear, an activation, a linear back to the first one's width; with or without a gate."""

from __future__ import annotations

import torch
from torch import fx

from bmgraph.observe import of_parameters_alone
from bmgraph.program import Program
from bmgraph.structure.sites import FeedForward
from bmgraph.structure.trace import ACTIVATIONS, ARITHMETIC, QUIET, downwards, is_linear, source_of, upwards

aten = torch.ops.aten

BETWEEN = QUIET | ARITHMETIC | ACTIVATIONS


def find_feedforwards(
    program: Program, sites: dict[fx.Node, str], taken: set[str]
) -> tuple[FeedForward, ...]:
    """Every feed-forward, once for each pair of matrices; linears in `taken` (those of attentions) are none."""
    found: dict[tuple[str, str], FeedForward] = {}
    for node in program.graph.nodes:
        if is_linear(node) and node in sites and sites[node] not in taken:
            item = _read(node, sites, taken)
            if item is not None:
                found.setdefault((item.up, item.down), item)
    return tuple(found.values())


def _read(down: fx.Node, sites: dict[fx.Node, str], taken: set[str]) -> FeedForward | None:
    walk = upwards(down.args[0], BETWEEN, is_linear)
    if not all(of_parameters_alone(node) for node in walk.ends):
        return None
    passed = walk.passed
    first = [node for node in walk.found if node in sites and sites[node] not in taken]
    activations = [node for node in passed if node.target in ACTIVATIONS]
    if not activations or not 1 <= len(first) <= 2:
        return None
    width = down.meta["val"].shape[-1]
    if len({source_of(node) for node in first}) != 1 or any(
        node.args[0].meta["val"].shape[-1] < 1 for node in first
    ):  # type: ignore[union-attr]
        return None
    if not any(_input_width(node) == width for node in first):
        return None
    size = int(down.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]
    name = _activation(activations)
    path = str(down.meta.get("scope", "")).rpartition(".")[0]
    if len(first) == 2:
        gate, up = sorted(first, key=lambda node: not _activated(node, set(passed)))
        return FeedForward(path, sites[up], sites[down], sites[gate], name, size)
    (only,) = first
    outputs = int(only.meta["val"].shape[-1])
    fused = outputs == 2 * size or (outputs // 2 == size and outputs > size)
    return FeedForward(path, sites[only], sites[down], sites[only] if fused else "", name, size)


def _input_width(linear: fx.Node) -> object:
    """The width of a linear's input in the residual stream: copies of channels that a pass added are not counted."""
    return source_of(linear).meta["val"].shape[-1]


def _activated(node: fx.Node, passed: set[fx.Node]) -> bool:
    """Whether a projection goes through the activation."""
    return (
        next(downwards(node, QUIET, lambda item: item in passed and item.target in ACTIVATIONS), None)
        is not None
    )


def _activation(nodes: list[fx.Node]) -> str:
    names = [node.target._schema.name.split("::")[1] for node in nodes]  # type: ignore[union-attr]
    for name in ("gelu", "relu", "silu"):
        if name in names:
            return name
    if "tanh" in names and "pow" in names:
        return "gelu (tanh)"
    return "sigmoid gelu" if names == ["sigmoid"] else "+".join(sorted(set(names)))
