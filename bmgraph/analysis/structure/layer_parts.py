"""Cuts a graph into parts that run one after the other: what comes before, between and after repeated layers, and each layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.sites import Embedding, Experts, Layer, Linear, Norm, Structure, Use
from bmgraph.ir.program import Program


@dataclass(frozen=True)
class GraphParts:
    """`layers` of each part, in running order: none for what comes before, between and after layers; `part_of`: the number
    of the part that a node belongs to; `constants`: nodes that read no input and no product, which are computed where they are read."""

    layers: tuple[tuple[Layer, ...], ...]
    part_of: dict[fx.Node, int]
    constants: set[fx.Node]


def cut_at_layers(program: Program) -> GraphParts:
    """Cut the entry of a program where its repeated layers begin and end; a graph without any is one part.

    A layer's part holds its sites, and whatever is computed from them until another part's site. Layers that share the weight
    of a product are one part, with all that runs between them. What depends on no site (masks, rotary tables) is computed in
    the part that reads it first, so that copies for one layer do not cross the others; before the first layer where that
    reads it. Time is linear in the number of nodes.
    """
    graph = program.graph
    structure = find(program)
    place = {node.name: index for index, node in enumerate(graph.nodes)}
    spans = _spans(program.entry, structure, place)
    used = {use.node for use in _uses(structure.linears, structure.experts) if use.graph == program.entry}
    others = _uses(structure.norms, structure.embeddings)
    sites = used | {use.node for use in others if use.graph == program.entry}
    constants: set[fx.Node] = set()
    after_site: set[fx.Node] = set()
    part_of: dict[fx.Node, int] = {}
    for node in graph.nodes:
        sources = node.all_input_nodes
        reads_constants = node.op != "placeholder" and all(item in constants for item in sources)
        if reads_constants and node.name not in used:
            constants.add(node)
        if node.name in sites:
            part_of[node] = _part_at(spans, place[node.name])
        else:
            part_of[node] = max((part_of[item] for item in sources if item not in constants), default=0)
        if node.name in sites or any(item in after_site for item in sources):
            after_site.add(node)
    _delay(graph, part_of, constants | after_site)
    return _without_empty(spans, part_of, constants)


_Span = tuple[int, int, tuple[Layer, ...]]
"""The places of the first and the last use of a site in one or more layers, and these layers."""


def _spans(graph: str, structure: Structure, place: dict[str, int]) -> list[_Span]:
    """The layers in order; those that share the weight of a product are one."""
    found: list[_Span] = []
    for layer in structure.layers:
        for run in layer.runs:
            places = [place[use.node] for use in run if use.graph == graph]
            if places:
                found.append((min(places), max(places), (layer,)))
    for uses in (*(item.uses for item in structure.linears), *(item.uses for item in structure.experts)):
        places = [place[use.node] for use in uses if use.graph == graph]
        if len(places) > 1:
            found.append((min(places), max(places), ()))
    merged: list[_Span] = []
    for begin, end, layers in sorted(found, key=lambda span: span[:2]):
        if merged and begin <= merged[-1][1]:
            first, last, known = merged.pop()
            added = tuple(layer for layer in layers if layer not in known)
            merged.append((first, max(last, end), (*known, *added)))
        else:
            merged.append((begin, end, layers))
    return [span for span in merged if span[2]]


def _uses(*kinds: Iterable[Linear | Experts | Norm | Embedding]) -> Iterable[Use]:
    """All uses of sites."""
    yield from (use for kind in kinds for site in kind for use in site.uses)


def _part_at(spans: list[_Span], place: int) -> int:
    """The part of a site at a place: odd numbers are layers, even ones what comes before, between and after them."""
    for index, (begin, end, _) in enumerate(spans):
        if place <= end:
            return 2 * index + (1 if place >= begin else 0)
    return 2 * len(spans)


def _delay(graph: fx.Graph, part_of: dict[fx.Node, int], stays: set[fx.Node]) -> None:
    """Move what depends on no site to the part that reads it first, if that is not the first layer or before it."""
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or node in stays or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        first = min((part_of[user] for user in node.users if user.op != "output"), default=0)
        if first > 1:
            part_of[node] = first


def _without_empty(spans: list[_Span], part_of: dict[fx.Node, int], constants: set[fx.Node]) -> GraphParts:
    """The parts that compute something, numbered without gaps."""
    filled = {part for node, part in part_of.items() if node.op == "call_function" and node not in constants}
    numbers = {part: number for number, part in enumerate(sorted(filled))}
    layers = tuple(spans[part // 2][2] if part % 2 else () for part in sorted(filled))
    return GraphParts(
        layers,
        {node: numbers.get(part, 0) for node, part in part_of.items()},
        constants,
    )
