"""Which neurons make an expert: by their weights, by what they do together, or at random; and which are always on."""

from __future__ import annotations

import torch

from bmgraph.analysis.interpreter import evaluate
from bmgraph.ir.program import Program
from bmgraph.passes.moefy.balanced_kmeans import EMPTY, balanced_clusters
from bmgraph.passes.moefy.coactivation import coactive_groups
from bmgraph.passes.moefy.neuron_statistics import NeuronStatistics
from bmgraph.passes.moefy.rewrite import SplitSite

CLUSTER, COACTIVATION, RANDOM = "cluster", "coactivation", "random"
SPLITS = (CLUSTER, COACTIVATION, RANDOM)


def first_weights(program: Program, site: SplitSite) -> torch.Tensor:
    """f[N, D]: the first weights of the neurons, the gate's where there is one."""
    projection = site.uses[0].projections[0]
    return evaluate(program, projection.linear.args[1])[projection.rows]  # type: ignore[arg-type]


def grouped_neurons(
    program: Program,
    site: SplitSite,
    experts: int,
    shared: int,
    split: str,
    partitioner: str,
    seed: int,
    statistics: NeuronStatistics | None,
) -> torch.Tensor:
    """The neurons of each expert, i64[experts, size], padded with EMPTY; the first `shared` are those most active."""
    size = -(-site.features // experts)
    device = program.device
    if not shared:
        rest = torch.arange(site.features, device=device)
        always = rest[:0].reshape(0, size)
    else:
        assert statistics is not None
        weight = evaluate(program, site.uses[0].down.args[1]).float()  # type: ignore[arg-type]
        order = (statistics.activity * weight.norm(dim=0)).argsort(descending=True, stable=True)
        always, rest = order[: shared * size].reshape(shared, size), order[shared * size :].sort().values
    count = experts - shared
    if split == CLUSTER:
        found = balanced_clusters(first_weights(program, site)[rest], count, seed)
    elif split == COACTIVATION:
        assert statistics is not None
        assert statistics.together is not None
        found = coactive_groups(
            statistics.together[rest][:, rest], count, -(-len(rest) // count), partitioner, seed
        )
    else:
        found = _random_groups(len(rest), count, seed).to(device)
    padded = torch.full((count, size), EMPTY, device=device)
    padded[:, : found.shape[1]] = torch.where(found == EMPTY, EMPTY, rest[found.clamp(min=0)])
    return torch.cat([always, padded])


def _random_groups(neurons: int, count: int, seed: int) -> torch.Tensor:
    """i64[count, ceil(neurons / count)]: neurons dealt out at random, padded with EMPTY."""
    order = torch.randperm(neurons, generator=torch.Generator().manual_seed(seed))
    size = -(-neurons // count)
    return torch.nn.functional.pad(order, (0, count * size - neurons), value=EMPTY).reshape(size, count).T
