"""How many experts of each feed-forward are active: by a total budget, spent where outputs drift most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.passes.moefy.ffn_neurons import FeedForwardUse
from bmgraph.passes.moefy.rewrite import Choice, GroupedFeedForward, split_into_experts
from bmgraph.passes.spend_budget import float_outputs, spent
from bmgraph.verify.metrics import relative_error

AUTO = "auto"


def check_average(average: float, experts: int, shared: int) -> None:
    """Raise InputError, which says what is nearest, for a mean number of active experts that cannot be met."""
    least = shared + 1
    if not least <= average <= experts:
        nearest = least if average < least else experts
        taken = f", {shared} of them for every token" if shared else ""
        raise InputError(
            f"average={average:g} cannot be met: a token takes {least} to {experts} experts{taken}; the nearest is average={nearest}"
        )


def active_within(
    program: Program,
    context: Context,
    sites: Sequence[GroupedFeedForward],
    lost: Mapping[str, Mapping[int, float]],
    choice: Callable[[str, int], Choice],
    average: float,
) -> dict[str, int]:
    """Site -> how many of its experts are active, such that their mean, by the sizes of experts, is at most `average`.

    Each feed-forward is split by itself, with as many experts as the mean allows, for the squared drift of the program's outputs
    (relative L2). `lost` says by what factor the squared error of its own output is another with each number of experts.
    """
    if not sites:
        return {}
    levels = sorted(lost[sites[0].name])
    tried = max(level for level in levels if level <= average)
    before = float_outputs(program, context)

    def drift_alone(site: GroupedFeedForward) -> float:
        after = float_outputs(_split_alone(program, site, choice(site.name, tried)), context)
        return max(map(relative_error, after, before), default=0.0)

    drifts: dict[str, dict[int, float]] = {}
    for site in sites:
        drift = context.kept(f"drift without experts of {site.name}", partial(drift_alone, site))
        own = lost[site.name]
        scale = drift**2 / own[tried] if own[tried] > 0 else 0.0
        drifts[site.name] = {level: scale * own[level] for level in levels}
    sizes = {site.name: _expert_size(site) for site in sites}
    return spent(drifts, sizes, levels, average)


def lost_shares(worth: torch.Tensor, predicted: torch.Tensor, first: int) -> dict[int, float]:
    """Number of active experts, from `first` on -> the share of all worth f[T, E] that experts beyond those of the highest
    predicted scores f[T, E] have."""
    order = predicted.argsort(dim=1, descending=True, stable=True)
    kept = worth.double().gather(1, order).cumsum(1).sum(0)
    whole = float(kept[-1])
    return {
        count: max(0.0, 1 - float(kept[count - 1]) / whole) if whole > 0 else 0.0
        for count in range(first, worth.shape[1] + 1)
    }


def _split_alone(program: Program, site: GroupedFeedForward, choice: Choice) -> Program:
    """A copy of the program in which this feed-forward alone is split."""
    copied = program.clone()
    nodes = {node.name: node for node in copied.graph.nodes}
    uses: list[FeedForwardUse] = [use.at(nodes) for use in site.uses]
    own = GroupedFeedForward(site.name, uses, site.features, site.groups, site.shared)
    with copied.edit() as editor:
        split_into_experts(editor, own, choice)
    return copied


def _expert_size(site: GroupedFeedForward) -> int:
    """How many weights an expert has."""
    use = site.uses[0]
    inputs = [item.linear.args[0].meta["val"].shape[-1] for item in use.projections]  # type: ignore[union-attr]
    return int(site.groups.shape[1]) * sum(map(int, (*inputs, use.down.meta["val"].shape[-1])))
