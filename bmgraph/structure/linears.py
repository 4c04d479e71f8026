"""Linears: parameters with all the products that use them."""

from __future__ import annotations

from torch import fx

from bmgraph.program import Program
from bmgraph.structure.sites import Linear
from bmgraph.structure.trace import is_linear
from bmgraph.weights import Weight, site_path, weight_of


def find_linears(program: Program) -> tuple[tuple[Linear, ...], dict[fx.Node, str]]:
    """Every linear, and the site that each product belongs to."""
    uses: dict[str, list[fx.Node]] = {}
    weights: dict[str, Weight] = {}
    sites: dict[fx.Node, str] = {}
    for graph in program.graphs.values():
        for node in graph.nodes:
            if is_linear(node) and (weight := weight_of(program, node)) is not None:
                uses.setdefault(weight.site, []).append(node)
                weights.setdefault(weight.site, weight)
                sites[node] = weight.site
    linears = []
    for site, nodes in uses.items():
        outputs, inputs = nodes[0].args[1].meta["val"].shape  # type: ignore[union-attr]
        names = tuple(node.name for node in nodes)
        linears.append(
            Linear(site, site_path(site), int(inputs), int(outputs), weights[site].transposed, names)
        )
    return tuple(linears), sites
