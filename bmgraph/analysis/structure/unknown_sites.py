"""Feed-forwards and attentions that the finder does not know, so that a pass can decline them by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import reads_no_input
from bmgraph.analysis.structure.linears import weight_name
from bmgraph.analysis.structure.sites import Structure
from bmgraph.analysis.weight_sites import OTHER_PRODUCTS, linears
from bmgraph.ir.matching import plain_size
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of

aten = torch.ops.aten

NEURONS, HEADS = "neurons", "heads"


@dataclass(frozen=True)
class UnknownSite:
    """What the units of an unknown block would be (NEURONS or HEADS), and why they are not known."""

    kind: str
    why: str


def unknown_sites(program: Program, structure: Structure) -> dict[str, UnknownSite]:
    """Name of a weight -> the block that ends in it and is no site.

    A block goes from a number of features through other linears or convolutions back to the same number. It is taken for an
    attention if two of its values are multiplied as matrices. It does not reach over a residual sum.
    """
    products = [*linears(program.graph), *filter(_convolves, program.graph.nodes)]
    weights = {
        node: weight_name(program, _weight(node)) for node in products if reads_no_input(_weight(node))
    }
    known = _known(structure)
    found: dict[str, UnknownSite] = {}
    for node, name in weights.items():
        if name in known or _features(node)[1] == 0:
            continue
        first, between = _first_products(node, weights)
        inner = [item for item in first if weights[item] not in known]
        if inner and len(inner) == len(first) and all(_features(i)[0] == _features(node)[1] for i in inner):
            found[name] = _unknown(between)
    return found


def _unknown(between: list[fx.Node]) -> UnknownSite:
    """What is not known of a block with these calls between its products."""
    if not any(traits_of(node).kind in OTHER_PRODUCTS and not _reads_weights(node) for node in between):
        return UnknownSite(
            NEURONS, "a block of linears or convolutions ends there whose neurons are not known"
        )
    if any(traits_of(node).kind is Kind.SOFTMAX for node in between):
        return UnknownSite(HEADS, "an attention in a form of its own ends there: its heads are not known")
    return UnknownSite(HEADS, "an attention without softmax ends there: its heads are not known")


def _reads_weights(product: fx.Node) -> bool:
    return any(reads_no_input(item) for item in product.all_input_nodes)


def _known(structure: Structure) -> set[str]:
    """The weights that belong to a site."""
    names: set[str | None] = set()
    for feedforward in structure.feedforwards:
        names |= {feedforward.down, *(part.linear for part in (feedforward.up, feedforward.gate) if part)}
    for attention in structure.attentions:
        names |= {attention.o, *(part.linear for part in (attention.q, attention.k, attention.v) if part)}
    return {name for name in names if name}


def _weight(node: fx.Node) -> fx.Node:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return weight


def _convolves(node: fx.Node) -> bool:
    return traits_of(node).kind is Kind.CONVOLUTION


def _features(node: fx.Node) -> tuple[int, int]:
    """How many features a product reads and gives; 0 where that is free."""
    axis = 1 if _convolves(node) else -1
    source: Any = node.args[0]
    given, made = (plain_size(item.meta["val"].shape[axis]) for item in (source, node))
    return given if isinstance(given, int) else 0, made if isinstance(made, int) else 0


def _first_products(last: fx.Node, products: dict[fx.Node, str]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The products nearest in front of one, and the calls on the way."""
    found: list[fx.Node] = []
    between: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack: list[fx.Node] = [last.args[0]]  # type: ignore[list-item]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in products:
            found.append(node)
        elif not _is_residual(node):
            between.append(node)
            stack.extend(node.all_input_nodes)
    return found, between


def _is_residual(node: fx.Node) -> bool:
    """Whether a node adds two values of one shape that depend on inputs."""
    values = [item for item in node.all_input_nodes if isinstance(item.meta.get("val"), torch.Tensor)]
    if node.target is not aten.add.Tensor or len(values) != 2:
        return False
    same = len({str(list(item.meta["val"].shape)) for item in values}) == 1
    return same and not any(map(reads_no_input, values))
