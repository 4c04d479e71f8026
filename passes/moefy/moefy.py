"""MoEfy: the neurons of a feed-forward in groups, of which each token computes a few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.site_filter import check_patterns, matches
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.sites import FeedForward
from bmgraph.errors import InputError, PassError
from bmgraph.ir.eval_form import in_eval
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import CALIBRATION, Context
from bmgraph.pass_manager.pass_base import Effect, Pass
from bmgraph.passes.moefy.balanced_kmeans import balanced_clusters
from bmgraph.passes.moefy.expert_weights import is_splittable, pick
from bmgraph.passes.moefy.ffn_neurons import Neurons, NotNeurons, neurons_of
from bmgraph.passes.moefy.rewrite import Grouped, entering, entering_down, part_neurons
from bmgraph.passes.moefy.router import HELD_OUT, Router, Sample, held, train_router, untrained_router

ROUTERS = ("trained", "oracle", "random")

LEAST_ROWS = 2 * HELD_OUT
"""The fewest calibration tokens that a router is made from."""


@dataclass(frozen=True, repr=False)
class MoEfy(Pass):
    """Part the neurons of every feed-forward into `experts` groups of equal size, of which each token computes `active`.

    Neurons whose first weights (the gate's, where there is one) point the same way come together; weights keep their
    names and become [experts, out, in], their codes and scales as they were. A feed-forward whose neurons do not divide
    is filled up with neurons of zeros. With active == experts nothing changes but the order of sums. A delta on a
    feed-forward goes on to work: its products, of low rank, are still made for all neurons.

    router: "trained", a small network that learns on the calibration batches how large each expert's output is;
    "random", the same untrained, as a control; "oracle", which computes all experts to choose the best: only for
    measuring. Routers do not train later (a choice has no gradient) and are marked frozen. include, exclude: globs over
    module paths of first linears. tokens: how many of the calibration batches' tokens a router is trained on; they are
    held in memory, f32[tokens, features] for each site.

    Raises PassError where there are more experts than neurons or no site is left, ResourceError without calibration.
    Source: Zhang et al. 2022 (MoEfication); the router after Szatkowski et al. 2024 (D2DMoE).

    Example:
        >>> from bmgraph.passes import MoEfy
        >>> MoEfy(experts=32, active=8, exclude=("*.layers.0.*",))
        moefy{experts=32,active=8,exclude=[*.layers.0.*]}
    """

    effect: ClassVar[Effect] = "approximate"
    provides: ClassVar[frozenset[str]] = frozenset({"moefied"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"moefied"})
    default_drift: ClassVar[float] = 1.0
    """What is left out depends on how few neurons the model uses for a token, which no option says: the bound stops only
    what is no better than no output at all. `max_drift` says what is good enough."""

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
        if self.tokens < LEAST_ROWS:
            raise InputError(f"tokens={self.tokens}: give at least {LEAST_ROWS}")

    @property
    def resources(self) -> tuple[str, ...]:
        """The batches that routers learn from."""
        return () if self.router == "oracle" else (CALIBRATION,)

    def run(self, program: Program, context: Context) -> Program:
        """Part the feed-forwards of a program."""
        if program.device.type == "meta":
            raise PassError("neurons are grouped by their weights, and a program on the meta device has none")
        sites = self._choose(program, context)
        samples = {}
        if sites and self.router != "oracle":
            samples = _samples(program, context, sites, self.tokens)
        with program.edit(by=str(self)) as editor:
            for site in sites:
                router, told = self._router(site, samples.get(site.name))
                part_neurons(editor, site, self.active, router)
                size = site.groups.shape[1]
                context.edited(
                    site.name, f"{self.experts} experts of {size} neurons, {self.active} active{told}"
                )
        return program

    def _choose(self, program: Program, context: Context) -> list[Grouped]:
        found = find(program).feedforwards
        names = [item.up.linear for item in found]
        check_patterns((*self.include, *self.exclude), names, "include or exclude")
        chosen = []
        for item in found:
            name = item.up.linear
            if not matches(name, self.include) or matches(name, self.exclude):
                continue
            if item.features < self.experts:
                raise PassError(
                    f"experts={self.experts}, but the feed-forward of {name} has {item.features} neurons: "
                    f"give at most {item.features}"
                )
            try:
                chosen.append(self._site(program, item))
            except NotNeurons as reason:
                context.declined(name, str(reason))
        return chosen

    def _site(self, program: Program, item: FeedForward) -> Grouped:
        """The nodes of a feed-forward, with its neurons in groups; raises NotNeurons where it cannot be parted."""
        uses = neurons_of(program, item)
        linears = {node for use in uses for node in (*use.linears, use.down)}
        for node in linears:
            weight = node.args[1]
            assert isinstance(weight, fx.Node)
            if not is_splittable(weight, linears):
                raise NotNeurons(
                    f"the weight of {node.name} is read elsewhere, or made in a way that cannot be parted"
                )
        first = uses[0].entrances[0]
        rows = evaluate(program, first.node.args[1])[first.rows]  # type: ignore[arg-type]
        groups = balanced_clusters(rows, self.experts, self.seed)
        return Grouped(item.up.linear, uses, groups, item.features)

    def _router(self, site: Grouped, sample: Sample | None) -> tuple[Router | None, str]:
        """The router of a site, and what is told of it."""
        if sample is None:
            return None, ", chosen by an oracle that computes them all"
        x, scores = sample.rows()
        if len(x) < LEAST_ROWS:
            raise PassError(
                f"{site.name}: a router needs at least {LEAST_ROWS} calibration tokens, not {len(x)}"
            )
        kept = torch.arange(len(x)) % HELD_OUT == 0
        if self.router == "random":
            router = untrained_router(x, self.experts, self.seed)
        else:
            router = train_router(x[~kept], scores[~kept], self.seed)
        share, best = (
            held(scores[kept], guesses, self.active) for guesses in (router(x[kept]), scores[kept])
        )
        return router, f"; they hold {share:.0%} of what all give (squared norms), the best choice {best:.0%}"


def _samples(program: Program, context: Context, sites: Sequence[Grouped], limit: int) -> dict[str, Sample]:
    """For each site, what entered it and the norm of what each expert gave, on calibration tokens."""
    samples = {site.name: Sample(limit) for site in sites}
    inputs: dict[str, torch.Tensor] = {}
    readers: dict[str, list[tuple[Grouped, Neurons, torch.Tensor]]] = {}
    for site in sites:
        matrix = evaluate(program, site.uses[0].down.args[1]).float()  # type: ignore[arg-type]
        columns = pick(matrix, site.groups, 1)
        gram = columns @ columns.transpose(1, 2)
        for use in site.uses:
            readers.setdefault(entering_down(use).name, []).append((site, use, gram))
    sources = {in_eval(entering(use)).name for site in sites for use in site.uses}

    def visit(name: str, value: torch.Tensor) -> None:
        if name in sources:
            inputs[name] = value.reshape(-1, value.shape[-1]).float()
        for site, use, gram in readers.get(name, ()):
            groups = pick(value.reshape(-1, value.shape[-1]).float(), site.groups, 1)
            norms = ((groups.transpose(1, 2) @ gram) * groups.transpose(1, 2)).sum(-1).clamp(min=0).sqrt()
            samples[site.name].add(inputs[in_eval(entering(use)).name], norms.T)

    context.calibrate(program, {*sources, *readers}, visit)
    return samples
