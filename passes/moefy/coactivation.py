"""Groups of neurons that are active together: a graph of co-activation, divided into parts of equal size.

Source: Zhang et al. 2022 (MoEfication), whose graphs METIS divides (Karypis and Kumar 1998); without it networkx bisects them
again and again (Kernighan and Lin 1970).
"""

from __future__ import annotations

import importlib.util
import random

import torch

from bmgraph.errors import PassError
from bmgraph.passes.moefy.balanced_kmeans import EMPTY

METIS, NETWORKX = "metis", "networkx"
PARTITIONERS = (METIS, NETWORKX)

NEIGHBORS = 32
"""Edges that a neuron keeps to others, the strongest; weak ones cost time and say little."""

STARTS = 4
"""Nodes that a part is grown from, before it is improved by swaps."""

LARGEST_WEIGHT = 1e4
"""Of an edge, rounded to an integer, as METIS takes them."""


def installed_partitioner() -> str:
    """METIS where `pymetis` is installed, else networkx."""
    return METIS if importlib.util.find_spec("pymetis") else NETWORKX


def coactive_groups(
    together: torch.Tensor, count: int, size: int, partitioner: str, seed: int = 0
) -> torch.Tensor:
    """Divide N neurons into `count` groups of at most `size`, with strong edges within groups: i64[count, size], padded with
    EMPTY.

    together f[N, N]: how strongly two neurons are active together, summed over tokens. Deterministic for a seed and a version
    of the partitioner. Raises PassError where METIS is asked for and not installed.
    """
    edges = _strongest(together.detach().float().cpu())
    divide = _by_metis if partitioner == METIS else _by_bisection
    groups = _balanced(divide(edges, count, seed), edges, count, size)
    return groups.to(together.device)


def _strongest(together: torch.Tensor) -> torch.Tensor:
    """i32[N, N], symmetric: integer weights of the edges that at least one of two neurons keeps, else 0."""
    weights = together.clone().fill_diagonal_(0).clamp(min=0)
    kept = min(NEIGHBORS, len(weights) - 1)
    least = weights.topk(kept, dim=1).values[:, -1:] if kept else weights
    strong = torch.where((weights >= least) | (weights >= least.T), weights, 0)
    return (strong * (LARGEST_WEIGHT / strong.max().clamp(min=1e-30))).ceil().int()


def _by_metis(edges: torch.Tensor, count: int, seed: int) -> list[int]:
    """The group of each neuron."""
    try:
        import pymetis
    except ImportError as error:
        raise PassError(
            "partitioner='metis' needs the package pymetis: install it, or take 'networkx'"
        ) from error
    if count == 1:
        return [0] * len(edges)
    found = edges.nonzero()
    starts = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(found[:, 0], minlength=len(edges))])
    _, parts = pymetis.part_graph(  # at once instead of by halves it gives parts of very different sizes
        count,
        pymetis.CSRAdjacency(starts.cumsum(0).tolist(), found[:, 1].tolist()),
        eweights=edges[found[:, 0], found[:, 1]].tolist(),
        recursive=True,
        options=pymetis.Options(seed=seed),
    )
    return list(parts)


def _by_bisection(edges: torch.Tensor, count: int, seed: int) -> list[int]:
    """The group of each neuron."""
    import networkx as nx

    graph = nx.Graph()
    graph.add_nodes_from(range(len(edges)))
    upper = edges.triu().nonzero()
    weights = edges[upper[:, 0], upper[:, 1]].tolist()
    graph.add_weighted_edges_from(
        (one, other, weight) for (one, other), weight in zip(upper.tolist(), weights)
    )
    draw = random.Random(seed)
    assigned = [EMPTY] * len(edges)

    def divide(nodes: list[int], first: int, groups: int) -> None:
        if groups == 1:
            for node in nodes:
                assigned[node] = first
            return
        left = groups // 2
        middle = min(max(round(len(nodes) * left / groups), left), len(nodes) - (groups - left))
        grown = _grown(edges[nodes][:, nodes], middle, draw)
        begin = {node for node, inside in zip(nodes, grown) if inside}
        halves = nx.community.kernighan_lin_bisection(graph.subgraph(nodes), (begin, set(nodes) - begin))
        one, other = sorted(
            halves, key=lambda half: abs(len(half) - middle)
        )  # in any order, of the sizes given
        divide(sorted(one), first, left)
        divide(sorted(other), first + left, groups - left)

    divide(list(range(len(edges))), 0, count)
    return assigned


def _grown(edges: torch.Tensor, size: int, draw: random.Random) -> list[bool]:
    """Of each node, whether it is in a part of `size` with a small cut: grown from STARTS nodes, each time by the node with the
    strongest edges to it; Kernighan and Lin's swaps begin there, since from a random part they end early."""
    best, found = None, torch.zeros(0)
    for start in draw.sample(range(len(edges)), min(STARTS, len(edges))):
        inside = torch.zeros(len(edges), dtype=torch.bool)
        inside[start], gain = True, edges[start].clone()
        for _ in range(size - 1):
            added = int(torch.where(inside, -1, gain).argmax())
            inside[added] = True
            gain += edges[added]
        cut = int(gain[~inside].sum())
        if best is None or cut < best:
            best, found = cut, inside
    return found.tolist()


def _balanced(parts: list[int], edges: torch.Tensor, count: int, size: int) -> torch.Tensor:
    """Groups of at most `size`, i64[count, size]: what a part has too many of goes, weakest first, where its edges are strongest."""
    assigned = torch.tensor(parts)
    for part in range(count):
        members = (assigned == part).nonzero().flatten()
        for _ in range(len(members) - size):
            within = edges[members][:, members].sum(1)
            moved = members[int(within.argmin())]
            room = torch.bincount(assigned, minlength=count) < size
            ties = torch.stack([edges[moved][assigned == other].sum() for other in range(count)])
            assigned[moved] = int(torch.where(room, ties, -1).argmax())
            members = members[members != moved]
    groups = torch.full((count, size), EMPTY)
    for part in range(count):
        members = (assigned == part).nonzero().flatten()
        groups[part, : len(members)] = members
    return groups
