"""What calibration tells of a feed-forward: which neurons are active, which of them together, and what each expert adds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from bmgraph.analysis.interpreter import evaluate
from bmgraph.ir.eval_form import in_eval
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.passes.moefy.expert_weights import gather_groups
from bmgraph.passes.moefy.rewrite import GroupedFeedForward, SplitSite, down_input, feedforward_input
from bmgraph.passes.moefy.router import Sample

MEMORY = 1 << 30
"""Bytes of co-activation that are in memory at once: feed-forwards beyond are counted in another run over the batches."""

NORM, MASS = "norm", "mass"
LABELS = (NORM, MASS)
"""What an expert is worth to a token: the norm of its output, or the sum of the magnitudes of its neurons."""


@dataclass
class NeuronStatistics:
    """Of N neurons, over all calibration tokens: `activity` f[N], the sum of magnitudes, and `together` f[N, N], the sum of
    the products of the magnitudes of two neurons, if it was asked for."""

    activity: torch.Tensor
    together: torch.Tensor | None


def neuron_statistics(
    program: Program, context: Context, sites: Sequence[SplitSite], together: bool
) -> Iterator[tuple[SplitSite, NeuronStatistics]]:
    """Each site with what is known of its neurons; with `together`, MEMORY bounds those that are known at once."""
    for part in _fitting(sites, together):
        found: dict[str, NeuronStatistics] = {}
        observers: dict[str, list[SplitSite]] = {}
        for site in part:
            zeros = torch.zeros(site.features, device=program.device)
            products = torch.zeros(site.features, site.features, device=program.device) if together else None
            found[site.name] = NeuronStatistics(zeros, products)
            for use in site.uses:
                observers.setdefault(down_input(use).name, []).append(site)

        context.calibrate(program, set(observers), partial(_count, found, observers))
        for site in part:
            yield site, found.pop(site.name)


def _count(
    found: Mapping[str, NeuronStatistics],
    observers: Mapping[str, Sequence[SplitSite]],
    name: str,
    value: torch.Tensor,
) -> None:
    """Add the tokens of a batch to what is known of the sites that observe the value."""
    rows = value.reshape(-1, value.shape[-1]).float().abs()
    for site in observers[name]:
        statistics = found[site.name]
        statistics.activity += rows.sum(0)
        if statistics.together is not None:
            statistics.together.addmm_(rows.T, rows)


def _fitting(sites: Sequence[SplitSite], together: bool) -> Iterator[list[SplitSite]]:
    """The sites in groups whose co-activation fits into MEMORY, at least one in each."""
    part: list[SplitSite] = []
    size = 0
    for site in sites:
        more = 4 * site.features**2 if together else 0
        if part and size + more > MEMORY:
            yield part
            part, size = [], 0
        part.append(site)
        size += more
    if part:
        yield part


def expert_samples(
    program: Program, context: Context, sites: Sequence[GroupedFeedForward], limit: int, labels: str
) -> dict[str, Sample]:
    """For each site, its input on calibration tokens and what each expert is worth to them by `labels`."""
    samples = {site.name: Sample(limit) for site in sites}
    inputs: dict[str, torch.Tensor] = {}
    observers: dict[str, list[tuple[GroupedFeedForward, str, torch.Tensor | None]]] = {}
    for site in sites:
        gram = None
        if labels == NORM:
            weight = evaluate(program, site.uses[0].down.args[1]).float()  # type: ignore[arg-type]
            columns = gather_groups(weight, site.groups, 1)
            gram = columns @ columns.transpose(1, 2)
        for use in site.uses:
            source = in_eval(feedforward_input(use)).name
            observers.setdefault(down_input(use).name, []).append((site, source, gram))
    sources = {source for found in observers.values() for _, source, _ in found}

    def visit(name: str, value: torch.Tensor) -> None:
        rows = value.reshape(-1, value.shape[-1]).float()
        if name in sources:
            inputs[name] = rows
        for site, source, gram in observers.get(name, ()):
            groups = gather_groups(rows, site.groups, 1)
            if gram is None:
                worth = groups.abs().sum(1)
            else:
                neurons = groups.transpose(1, 2)
                worth = ((neurons @ gram) * neurons).sum(-1).clamp(min=0).sqrt()
            samples[site.name].add(inputs[source], worth.T)

    context.calibrate(program, {*sources, *observers}, visit)
    return samples
