"""Chooses which values of forward to keep for backward: the fewest bytes from which the others can be computed again.

A minimum cut between what cannot be computed again and what backward reads, with values as edges whose capacity is their
size (as AOTAutograd's partitioner does it; Jain et al. 2020, arXiv:1910.02653, solve a finer problem).
"""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import torch
from torch import fx

from bmgraph.passes.remat.forward_part import ForwardPart

_SOURCE, _SINK = "source", "sink"


def kept_values(part: ForwardPart, can_recompute: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The calls of forward whose values are kept for backward; of equal cuts the one nearest to backward.

    What lives anyway (inputs, parameters, what is returned) is not among them.
    """
    graph = nx.DiGraph()
    graph.add_nodes_from((_SOURCE, _SINK))
    stack = []
    for node in part.nodes[: part.end]:
        if not part.is_free(node) and any(
            part.place[user] >= part.end for user in node.users if user.op != "output"
        ):
            graph.add_edge((node, "out"), _SINK)  # without a capacity: infinite
            stack.append(node)
    seen: set[fx.Node] = set(stack)
    while stack:
        node = stack.pop()
        if isinstance(node.meta["val"], torch.Tensor):
            graph.add_edge((node, "in"), (node, "out"), capacity=part.sizes[node])
        else:
            graph.add_edge((node, "in"), (node, "out"))  # several results: each is kept by itself
        if not can_recompute(node):
            graph.add_edge(_SOURCE, (node, "in"))
            continue
        for source in node.all_input_nodes:
            if part.is_free(source):
                continue
            graph.add_edge((source, "out"), (node, "in"))
            if source not in seen:
                seen.add(source)
                stack.append(source)
    _, (_, after) = nx.minimum_cut(graph, _SOURCE, _SINK)
    return {node for node in seen if (node, "out") in after and (node, "in") not in after}
