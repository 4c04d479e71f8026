"""The pass MoEfy: its options, which feed-forwards it splits, and calibration of their routers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import read_by
from bmgraph.analysis.site_filter import matches, resolve_patterns
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.sites import FeedForward
from bmgraph.analysis.structure.unknown_sites import NEURONS, unknown_sites
from bmgraph.errors import PassError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import CALIBRATION, Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.moefy.active_experts import AUTO, active_within, lost_shares
from bmgraph.passes.moefy.choice_checks import check_choices
from bmgraph.passes.moefy.coactivation import NETWORKX, installed_partitioner
from bmgraph.passes.moefy.expert_weights import is_splittable
from bmgraph.passes.moefy.ffn_neurons import NotSplittable, feedforward_uses
from bmgraph.passes.moefy.grouping import CLUSTER, COACTIVATION, first_weights, grouped_neurons
from bmgraph.passes.moefy.neuron_statistics import (
    MASS,
    NORM,
    NeuronStatistics,
    expert_samples,
    neuron_statistics,
)
from bmgraph.passes.moefy.rewrite import Choice, GroupedFeedForward, SplitSite, split_into_experts, take_all
from bmgraph.passes.moefy.router import (
    MASS_HIDDEN,
    MASS_STEPS,
    MIN_TOKENS,
    ORACLE,
    SIMILARITY,
    TRAINED,
    UNTRAINED,
    Router,
    RouterTensors,
    Sample,
    centroid_router,
    held_out,
    mean_above,
    retained_share,
    train_router,
    untrained_router,
)
from bmgraph.verify.proof import Proof


@dataclass(frozen=True, repr=False)
class MoEfy(ModelPass):
    """Split every feed-forward into `experts` groups of neurons of equal size, of which each token computes `active`.

    Weights keep their names and become [experts, out, in]; quantized codes and scales are moved, not rounded again. If the number
    of neurons is not a multiple of `experts`, groups are padded with neurons of zeros. With active == experts only the order of
    sums changes. Deltas on a feed-forward keep working: their low-rank products are still computed for all neurons.

    split: "cluster" groups neurons by the direction of their first weights (the gate's, where there is one), "coactivation"
    those that are active together on the calibration batches, by dividing their graph (with METIS, where the package pymetis is
    installed, else networkx; `partitioner` records which); "random" is a control. shared: how many experts every token takes;
    they hold the neurons that add most on the calibration batches, and count among the active ones.

    router: "trained", a small network that learns from the calibration batches to predict what each expert is worth to a token;
    "similarity" compares a token with the mean of an expert's first weights and needs no data; "random", the trained one's network
    untrained, as a control; "oracle", which computes all experts to choose the best, for measurements only. labels: what an
    expert is worth, the "norm" of its output or the "mass" of its activations, the sum of their magnitudes. Routers are frozen:
    a choice has no gradient. `Distill` behind this pass trains the experts with their routers in place.

    active: a number, or "auto", which gives each feed-forward its own, `average` over all, by how far the program's outputs drift
    where that feed-forward alone is split; the history records them as pairs of a site and its number, and a replay does not
    measure. threshold: of its active experts a token drops those that are worth less than this share of the best one (of those
    that are not shared): outputs are those of the others, and nothing is saved yet by what is dropped.

    include, exclude: globs over the module paths of first linears. tokens: the most calibration tokens that a router is trained
    on; they are held in memory, f32[tokens, features] for each site.

    Raises PassError where there are more experts than neurons or no site is left, ResourceError without calibration.
    Sources: Zhang et al. 2022 (MoEfication, arXiv:2110.01786); the trained router and the threshold after Szatkowski et al. 2024
    (D2DMoE, arXiv:2310.04361); shared experts after Dai et al. 2024 (DeepSeekMoE, arXiv:2401.06066).

    Example:
        >>> from bmgraph.passes import MoEfy
        >>> MoEfy(experts=32, active=8, exclude=("*.layers.0.*",))
        moefy{experts=32,active=8,exclude=[*.layers.0.*]}
        >>> MoEfy(experts=32, active="auto", average=6, split="coactivation", shared=1)
        moefy{experts=32,active=auto,split=coactivation,shared=1,average=6}
    """

    effect: ClassVar[Effect] = "approximate"
    provides: ClassVar[frozenset[str]] = frozenset({"moefied"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"moefied"})
    default_drift: ClassVar[float] = 1.0
    saves: ClassVar[bool] = True
    """The error depends on how sparse the model's activations are, which no option says: the default bound only rejects
    what is worse than an output of zeros. Set `max_drift` to what is good enough.
    """

    experts: int = 16
    active: int | str | tuple[tuple[str, int], ...] = 4
    router: str = TRAINED
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    tokens: int = 8192
    seed: int = 0
    split: str = field(default=CLUSTER, kw_only=True)
    shared: int = field(default=0, kw_only=True)
    labels: str = field(default=NORM, kw_only=True)
    average: float | None = field(default=None, kw_only=True)
    threshold: float | None = field(default=None, kw_only=True)
    partitioner: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)

    @property
    def resources(self) -> tuple[str, ...]:
        """The calibration batches, where something is measured on them."""
        return (CALIBRATION,) if self._observes or self._samples else ()

    @property
    def _observes(self) -> bool:
        """Whether neurons are grouped by what they do."""
        return self.split == COACTIVATION or self.shared > 0

    @property
    def _samples(self) -> bool:
        """Whether experts are measured."""
        return self.router in (TRAINED, UNTRAINED) or self.active == AUTO

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
        chosen = self._choose(program, context)
        settled = self
        if self.split == COACTIVATION and self.partitioner is None:
            settled = replace(settled, partitioner=installed_partitioner())
        sites = self._grouped(program, context, chosen, settled.partitioner or NETWORKX)
        samples: dict[str, Sample] = {}
        if sites and (self._samples or (self.router == SIMILARITY and context.has(CALIBRATION))):
            samples = expert_samples(program, context, sites, self.tokens, self.labels)
        routers = {
            site.name: Router.of_tensors(
                context.kept(
                    f"router of {site.name}",
                    partial(self._router_tensors, program, site, samples.get(site.name)),
                )
            )
            for site in sites
        }
        counts = self._counts(program, context, sites, routers, samples)
        if self.active == AUTO:
            settled = replace(settled, active=tuple(counts.items()), average=None)
        if settled is not self:
            context.settle(settled)
        with program.edit(by=str(self)) as editor:
            for site in sites:
                router, active = routers[site.name], counts[site.name]
                tensors = read_by(node for use in site.uses for node in (*use.linears, use.down))
                split_into_experts(editor, site, self._choice(active, router))
                context.edited(site.name, self._said(site, active, router, samples.get(site.name)), tensors)
        return program

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """With all experts active, nothing may change."""
        everything = after.clone()
        take_all(everything, str(self), self.experts)
        proof.same(before, everything, "with all experts active it is not the model", slack=10)

    def _choose(self, program: Program, context: Context) -> list[SplitSite]:
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
                chosen.append(_splittable(program, feedforward))
            except NotSplittable as reason:
                context.declined(name, str(reason))
        for name, unknown in unknown_sites(program, structure).items():
            if unknown.kind == NEURONS and matches(name, include) and not matches(name, exclude):
                context.declined(name, unknown.why)
        return chosen

    def _grouped(
        self, program: Program, context: Context, chosen: Sequence[SplitSite], partitioner: str
    ) -> list[GroupedFeedForward]:
        """The sites with their neurons in groups."""
        for site in chosen:
            size = -(-site.features // self.experts)
            if site.features - self.shared * size < self.experts - self.shared:
                raise PassError(
                    f"{site.name}: {self.shared} shared experts take {self.shared * size} of its {site.features} neurons, and "
                    f"{self.experts - self.shared} others do not get one each: give fewer experts, or a smaller shared="
                )

        def grouped(site: SplitSite, statistics: NeuronStatistics | None) -> torch.Tensor:
            return grouped_neurons(
                program, site, self.experts, self.shared, self.split, partitioner, self.seed, statistics
            )

        if self._observes:
            together = self.split == COACTIVATION
            groups = context.kept(
                "neurons in groups by what they do",
                lambda: {
                    site.name: grouped(site, statistics)
                    for site, statistics in neuron_statistics(program, context, chosen, together)
                },
            )
        else:
            groups = {
                site.name: context.kept(f"neurons of {site.name} in groups", partial(grouped, site, None))
                for site in chosen
            }
        return [
            GroupedFeedForward(site.name, site.uses, site.features, groups[site.name], self.shared)
            for site in chosen
        ]

    def _router_tensors(
        self, program: Program, site: GroupedFeedForward, sample: Sample | None
    ) -> RouterTensors | None:
        router = self._router(program, site, sample)
        return None if router is None else router.tensors

    def _router(self, program: Program, site: GroupedFeedForward, sample: Sample | None) -> Router | None:
        """The router of a site; None for an oracle."""
        routed = site.groups[self.shared :]
        if self.router == SIMILARITY:
            return centroid_router(first_weights(program, site), routed).with_shared(self.shared)
        if sample is None:
            return None
        x, scores = sample.rows()
        if len(x) < MIN_TOKENS:
            raise PassError(
                f"{site.name}: a router needs at least {MIN_TOKENS} calibration tokens, not {len(x)}"
            )
        if self.router == ORACLE:
            return None
        if self.router == UNTRAINED:
            return untrained_router(x, len(routed), self.seed).with_shared(self.shared)
        trained = ~held_out(x)
        x, scores = x[trained], scores[trained][:, self.shared :]
        if self.labels == MASS:  # roots, since a few large masses would outweigh the rest
            found = train_router(x, scores.sqrt(), self.seed, MASS_STEPS, MASS_HIDDEN)
        else:
            found = train_router(x, scores, self.seed)
        return found.with_shared(self.shared)

    def _counts(
        self,
        program: Program,
        context: Context,
        sites: Sequence[GroupedFeedForward],
        routers: Mapping[str, Router | None],
        samples: Mapping[str, Sample],
    ) -> dict[str, int]:
        """Site -> how many of its experts are active."""
        if isinstance(self.active, int):
            return dict.fromkeys(routers, self.active)
        if self.active == AUTO:
            assert self.average is not None
            lost = {name: self._lost(item, routers[name]) for name, item in samples.items()}

            def choice(name: str, active: int) -> Choice:
                return self._choice(active, routers[name])

            return active_within(program, context, sites, lost, choice, self.average)
        assert not isinstance(self.active, str)
        known = dict(self.active)
        missing = [name for name in routers if name not in known]
        if missing:
            raise PassError(
                f"active= says nothing of {missing[0]}: give the number of every feed-forward, or active={AUTO!r} with average="
            )
        return {name: known[name] for name in routers}

    def _measured(
        self, sample: Sample, router: Router | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """On rows that no router was trained on, f[N, E]: what experts are worth (masses, squared norms), the scores that the
        router gives, and those of the best choice."""
        x, scores = sample.rows()
        x, scores = x[held_out(x)], scores[held_out(x)]
        best = scores.clone()
        best[:, : self.shared] = torch.inf
        worth = scores if self.labels == MASS else scores**2
        return worth, best if router is None else router(x), best

    def _lost(self, sample: Sample, router: Router | None) -> dict[int, float]:
        """Number of active experts -> the share of all output that the others have."""
        worth, predicted, _ = self._measured(sample, router)
        return lost_shares(worth**2 if self.labels == MASS else worth, predicted, self.shared + 1)

    def _choice(self, active: int, router: Router | None) -> Choice:
        return Choice(active, router, self.labels == MASS, self._least(router))

    def _least(self, router: Router | None) -> float | None:
        """The threshold of scores: those of a router of masses are their roots."""
        rooted = self.labels == MASS and router is not None
        return self.threshold**0.5 if rooted and self.threshold is not None else self.threshold

    def _said(
        self, site: GroupedFeedForward, active: int, router: Router | None, sample: Sample | None
    ) -> str:
        """What a site becomes, in words."""
        said = f"{self.experts} experts of {site.groups.shape[1]} neurons, {active} active" + (
            f", {self.shared} of them for every token" if self.shared else ""
        )
        if router is None:
            said += ", chosen by an oracle that computes all of them"
        if sample is None or router is None:
            return said
        worth, predicted, best = self._measured(sample, router)
        share, most = (retained_share(worth, scores, active) for scores in (predicted, best))
        unit = "activation mass" if self.labels == MASS else "output (squared norms)"
        said += f"; chosen experts give {share:.0%} of all {unit}, the best choice {most:.0%}"
        least = self._least(router)
        if least is not None:
            said += (
                f"; above the threshold are {mean_above(predicted, active, least, self.shared):.1f} of them"
            )
        return said


def _splittable(program: Program, feedforward: FeedForward) -> SplitSite:
    """A feed-forward as a site; raises NotSplittable where it cannot be split."""
    uses = feedforward_uses(program, feedforward)
    linears = {node for use in uses for node in (*use.linears, use.down)}
    for node in linears:
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        if not is_splittable(weight, linears):
            raise NotSplittable(
                f"the weight of {node.name} is read elsewhere, or computed in a way that cannot be split"
            )
    return SplitSite(feedforward.up.linear, uses, feedforward.features)
