"""Balanced k-means: clusters of equal size."""

from __future__ import annotations

import torch

EMPTY = -1
"""Padding index: no row here."""


def balanced_clusters(rows: torch.Tensor, count: int, seed: int = 0, steps: int = 30) -> torch.Tensor:
    """Cluster rows f[N, D] by direction into `count` clusters of at most S = ceil(N / count): i64[count, S], padded with EMPTY.

    K-means on rows of length 1 with at most S rows a cluster. Assignment goes in rounds: every free row asks the nearest
    cluster with room, which accepts the nearest of the rows that ask. Deterministic for a seed; O(steps * N * count * D).
    Source: Zhang et al. 2022 (MoEfication), balanced k-means of Malinen and Fränti 2014.
    """
    points = torch.nn.functional.normalize(rows.detach().float(), dim=1)
    size = -(-len(points) // count)
    generator = torch.Generator().manual_seed(seed)
    centers = points[torch.randperm(len(points), generator=generator)[:count].to(points.device)]
    assigned = _assign(points @ centers.T, size)
    for _ in range(steps):
        sums = points.new_zeros(count, points.shape[1]).index_add(0, assigned, points)
        reassigned = _assign(points @ torch.nn.functional.normalize(sums, dim=1).T, size)
        if torch.equal(reassigned, assigned):
            break
        assigned = reassigned
    groups = torch.full((count, size), EMPTY, device=points.device)
    for index in range(count):
        members = (assigned == index).nonzero().flatten()
        groups[index, : len(members)] = members
    return groups


def _assign(similarity: torch.Tensor, size: int) -> torch.Tensor:
    """similarity f[N, C] -> the cluster of every row, i64[N], with at most `size` rows a cluster."""
    available = similarity.clone()
    assigned = torch.full((len(available),), EMPTY, device=available.device)
    room = torch.full((available.shape[1],), size, device=available.device)
    while bool((free := assigned == EMPTY).any()):
        available[:, room == 0] = -torch.inf
        wanted = available.argmax(1)
        for cluster in sorted(set(wanted[free].tolist())):
            candidates = (free & (wanted == cluster)).nonzero().flatten()
            accepted = available[candidates, cluster].argsort(descending=True, stable=True)[
                : int(room[cluster])
            ]
            assigned[candidates[accepted]] = cluster
            room[cluster] -= len(accepted)
    return assigned
