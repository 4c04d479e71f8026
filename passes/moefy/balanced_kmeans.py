"""Rows in groups of equal size."""

from __future__ import annotations

import torch

EMPTY = -1
"""Stands in a group for a row that there is not."""


def balanced_clusters(rows: torch.Tensor, count: int, seed: int = 0, steps: int = 30) -> torch.Tensor:
    """Group rows f[N, D] by direction into `count` clusters of at most S = ceil(N / count): i64[count, S], EMPTY behind.

    K-means on rows of length 1, whose clusters take no more than S each: in rounds every row asks the nearest cluster
    with room, which keeps the nearest of those that ask. Deterministic by its seed; O(steps * N * count * D).
    Source: Zhang et al. 2022 (MoEfication), balanced k-means of Malinen and Fränti 2014.
    """
    points = torch.nn.functional.normalize(rows.detach().float(), dim=1)
    size = -(-len(points) // count)
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(len(points), generator=generator)[:count].to(points.device)]
    chosen = _assign(points @ centres.T, size)
    for _ in range(steps):
        sums = points.new_zeros(count, points.shape[1]).index_add(0, chosen, points)
        again = _assign(points @ torch.nn.functional.normalize(sums, dim=1).T, size)
        if torch.equal(again, chosen):
            break
        chosen = again
    groups = torch.full((count, size), EMPTY, device=points.device)
    for index in range(count):
        members = (chosen == index).nonzero().flatten()
        groups[index, : len(members)] = members
    return groups


def _assign(nearness: torch.Tensor, size: int) -> torch.Tensor:
    """nearness f[N, C] -> the cluster of every row, i64[N], none chosen by more than `size`."""
    left = nearness.clone()
    chosen = torch.full((len(left),), EMPTY, device=left.device)
    room = torch.full((left.shape[1],), size, device=left.device)
    while bool((free := chosen == EMPTY).any()):
        left[:, room == 0] = -torch.inf
        asked = left.argmax(1)
        for cluster in sorted(set(asked[free].tolist())):
            asking = (free & (asked == cluster)).nonzero().flatten()
            best = left[asking, cluster].argsort(descending=True, stable=True)[: int(room[cluster])]
            chosen[asking[best]] = cluster
            room[cluster] -= len(best)
    return chosen
