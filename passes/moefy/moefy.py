"""The pass MoEfy: its options, which feed-forwards it splits, and calibration of their routers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate, read_by
from bmgraph.analysis.site_filter import matches, resolve_patterns
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.sites import FeedForward
from bmgraph.analysis.structure.unknown_sites import NEURONS, unknown_sites
from bmgraph.errors import InputError, PassError
from bmgraph.ir.eval_form import in_eval
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import CALIBRATION, Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.moefy.balanced_kmeans import balanced_clusters
from bmgraph.passes.moefy.expert_weights import gather_groups, is_splittable
from bmgraph.passes.moefy.ffn_neurons import FeedForwardUse, NotSplittable, feedforward_uses
from bmgraph.passes.moefy.rewrite import GroupedFeedForward, down_input, feedforward_input, split_into_experts
from bmgraph.passes.moefy.router import (
    HELD_OUT,
    Router,
    Sample,
    retained_share,
    train_router,
    untrained_router,
)
from bmgraph.verify.proof import Proof

ROUTERS = ("trained", "oracle", "random")

MIN_TOKENS = 2 * HELD_OUT
"""The fewest calibration tokens that a router is trained on."""


@dataclass(frozen=True, repr=False)
class MoEfy(ModelPass):
    """Split every feed-forward into `experts` groups of neurons of equal size, of which each token computes `active`.

    Neurons are grouped by the direction of their first weights (the gate's, where there is one). Weights keep their names
    and become [experts, out, in]; quantized codes and scales are moved, not rounded again. If the number of neurons is not a
    multiple of `experts`, groups are padded with neurons of zeros. With active == experts only the order of sums changes.
    Deltas on a feed-forward keep working: their low-rank products are still computed for all neurons.

    router: "trained", a small network that learns from the calibration batches to predict the norm of each expert's output;
    "random", the same network untrained, as a control; "oracle", which computes all experts to choose the best, for
    measurements only. Routers are frozen: a choice has no gradient. include, exclude: globs over the module paths of first
    linears. tokens: the most calibration tokens that a router is trained on; they are held in memory, f32[tokens, features]
    for each site.

    Raises PassError where there are more experts than neurons or no site is left, ResourceError without calibration.
    Sources: Zhang et al. 2022 (MoEfication); the router after Szatkowski et al. 2024 (D2DMoE).

    Example:
        >>> from bmgraph.passes import MoEfy
        >>> MoEfy(experts=32, active=8, exclude=("*.layers.0.*",))
        moefy{experts=32,active=8,exclude=[*.layers.0.*]}
    """

    effect: ClassVar[Effect] = "approximate"
    provides: ClassVar[frozenset[str]] = frozenset({"moefied"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"moefied"})
    default_drift: ClassVar[float] = 1.0
    """The error depends on how sparse the model's activations are, which no option says: the default bound only rejects
    what is worse than an output of zeros. Set `max_drift` to what is good enough.
    """

    experts: int = 16
    active: int = 4
    router: str = "trained"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    tokens: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts < 2:
            raise InputError(f"experts={self.experts}: give at least 2")
        if not 1 <= self.active <= self.experts:
            raise InputError(f"active={self.active}: give 1 to {self.experts}, the number of experts")
        if self.router not in ROUTERS:
            raise InputError(f"router={self.router!r}: choose one of {', '.join(ROUTERS)}")
        if self.tokens < MIN_TOKENS:
            raise InputError(f"tokens={self.tokens}: give at least {MIN_TOKENS}")

    @property
    def resources(self) -> tuple[str, ...]:
        """The calibration batches, unless the router is an oracle."""
        return () if self.router == "oracle" else (CALIBRATION,)

    def fits(self, program: Program, context: Context) -> bool:
        """Whether a feed-forward can be split."""
        for feedforward in find(program).feedforwards:
            try:
                feedforward_uses(program, feedforward)
            except NotSplittable:
                continue
            return True
        return False

    def run(self, program: Program, context: Context) -> Program:
        """Split the feed-forwards of a program."""
        if program.device.type == "meta":
            raise PassError(
                "neurons are grouped by their weights, and a program on the meta device has no values"
            )
        sites = self._choose(program, context)
        samples = {}
        if sites and self.router != "oracle":
            samples = _samples(program, context, sites, self.tokens)
        with program.edit(by=str(self)) as editor:
            for site in sites:
                router, quality = self._router(site, samples.get(site.name))
                tensors = read_by(node for use in site.uses for node in (*use.linears, use.down))
                split_into_experts(editor, site, self.active, router)
                size = site.groups.shape[1]
                context.edited(
                    site.name,
                    f"{self.experts} experts of {size} neurons, {self.active} active{quality}",
                    tensors,
                )
        return program

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """With all experts active, nothing may change."""
        everything = after.clone()
        for node in everything.graph.nodes:
            if node.target is torch.ops.aten.topk.default and node.meta.get("pass") == str(self):
                node.update_arg(1, self.experts)
        proof.same(before, everything, "with all experts active it is not the model", slack=10)

    def _choose(self, program: Program, context: Context) -> list[GroupedFeedForward]:
        structure = find(program)
        found = structure.feedforwards
        names = [feedforward.up.linear for feedforward in found]
        include = resolve_patterns(self.include, names, "include")
        exclude = resolve_patterns(self.exclude, names, "exclude")
        chosen = []
        for feedforward in found:
            name = feedforward.up.linear
            if not matches(name, include) or matches(name, exclude):
                continue
            if feedforward.features < self.experts:
                raise PassError(
                    f"experts={self.experts}, but the feed-forward of {name} has {feedforward.features} neurons: "
                    f"give at most {feedforward.features}"
                )
            try:
                chosen.append(self._site(program, feedforward))
            except NotSplittable as reason:
                context.declined(name, str(reason))
        for name, unknown in unknown_sites(program, structure).items():
            if unknown.kind == NEURONS and matches(name, include) and not matches(name, exclude):
                context.declined(name, unknown.why)
        return chosen

    def _site(self, program: Program, feedforward: FeedForward) -> GroupedFeedForward:
        """A feed-forward with its neurons in groups; raises NotSplittable where it cannot be split."""
        uses = feedforward_uses(program, feedforward)
        linears = {node for use in uses for node in (*use.linears, use.down)}
        for node in linears:
            weight = node.args[1]
            assert isinstance(weight, fx.Node)
            if not is_splittable(weight, linears):
                raise NotSplittable(
                    f"the weight of {node.name} is read elsewhere, or computed in a way that cannot be split"
                )
        projection = uses[0].projections[0]
        rows = evaluate(program, projection.linear.args[1])[projection.rows]  # type: ignore[arg-type]
        groups = balanced_clusters(rows, self.experts, self.seed)
        return GroupedFeedForward(feedforward.up.linear, uses, groups, feedforward.features)

    def _router(self, site: GroupedFeedForward, sample: Sample | None) -> tuple[Router | None, str]:
        """The router of a site (None for an oracle), and its quality in words for the report."""
        if sample is None:
            return None, ", chosen by an oracle that computes all of them"
        x, scores = sample.rows()
        if len(x) < MIN_TOKENS:
            raise PassError(
                f"{site.name}: a router needs at least {MIN_TOKENS} calibration tokens, not {len(x)}"
            )
        held_out = torch.arange(len(x)) % HELD_OUT == 0
        if self.router == "random":
            router = untrained_router(x, self.experts, self.seed)
        else:
            router = train_router(x[~held_out], scores[~held_out], self.seed)
        share, best = (
            retained_share(scores[held_out], guesses, self.active)
            for guesses in (router(x[held_out]), scores[held_out])
        )
        return (
            router,
            f"; chosen experts give {share:.0%} of all output (squared norms), the best choice {best:.0%}",
        )


def _samples(
    program: Program, context: Context, sites: Sequence[GroupedFeedForward], limit: int
) -> dict[str, Sample]:
    """For each site, its input and the norm of each expert's output, on calibration tokens."""
    samples = {site.name: Sample(limit) for site in sites}
    inputs: dict[str, torch.Tensor] = {}
    observers: dict[str, list[tuple[GroupedFeedForward, FeedForwardUse, torch.Tensor]]] = {}
    for site in sites:
        weight = evaluate(program, site.uses[0].down.args[1]).float()  # type: ignore[arg-type]
        columns = gather_groups(weight, site.groups, 1)
        gram = columns @ columns.transpose(1, 2)
        for use in site.uses:
            observers.setdefault(down_input(use).name, []).append((site, use, gram))
    sources = {in_eval(feedforward_input(use)).name for site in sites for use in site.uses}

    def visit(name: str, value: torch.Tensor) -> None:
        if name in sources:
            inputs[name] = value.reshape(-1, value.shape[-1]).float()
        for site, use, gram in observers.get(name, ()):
            groups = gather_groups(value.reshape(-1, value.shape[-1]).float(), site.groups, 1)
            norms = ((groups.transpose(1, 2) @ gram) * groups.transpose(1, 2)).sum(-1).clamp(min=0).sqrt()
            samples[site.name].add(inputs[in_eval(feedforward_input(use)).name], norms.T)

    context.calibrate(program, {*sources, *observers}, visit)
    return samples
