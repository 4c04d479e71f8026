"""The pass Shrink: its options, which neurons and heads it scores, and which it removes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from bmgraph.analysis.coupling.coupled_dims import NONE, Coupling, CouplingError, Labels, Spread
from bmgraph.analysis.coupling.op_rules import DimRef
from bmgraph.analysis.interpreter import evaluate, reads_no_input
from bmgraph.analysis.site_filter import matches, resolve_patterns
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.sites import Part, Structure
from bmgraph.analysis.structure.unknown_sites import NEURONS, unknown_sites
from bmgraph.analysis.weight_sites import linears
from bmgraph.deltas.backbone import backbone_of
from bmgraph.errors import InputError
from bmgraph.ir.program import Program, tensor_nodes
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.shrink.silenced import depends_on_count, silenced
from bmgraph.passes.shrink.slice_program import remove_units
from bmgraph.utils.digest import fingerprint
from bmgraph.utils.share import share_of
from bmgraph.verify.proof import Proof

GROUP = 4
"""Neurons are removed four at a time if the weight that reads them is masked: groups of a 2:4 pattern stay whole."""

Score = Callable[[Program, Spread, int], torch.Tensor]
"""A program, the dimensions of a site's units, and the number of units -> the importance of each unit, f[units]."""


def magnitude(program: Program, spread: Spread, units: int) -> torch.Tensor:
    """Each unit's share of the squares of all coupled matrices, times the number of units: 1 on average.

    All matrices count the same, so that scores can be compared between sites.
    """
    shares = [
        _squares(evaluate(program, weight), dim, spread.labels[weight, dim], units)
        for weight, dim in _matrices(program, spread)
    ]
    return torch.stack([units * share / share.sum().clamp(min=1e-30) for share in shares]).mean(0)


SCORES: dict[str, Score] = {"magnitude": magnitude}
"""Name of a score -> the score."""

SCOPES = ("layer", "global")


@dataclass(frozen=True, repr=False)
class Shrink(ModelPass):
    """Remove the given shares of the neurons of feed-forwards and of the heads of attentions.

    ffn, heads: shares from 0 to below 1; at least one neuron and one head always stay. scope: "layer" removes the share in
    each site; "global" ranks the units of all sites together, so that layers may end up with different sizes. score:
    "magnitude" (of all weights that belong to a neuron or a head). include, exclude: globs over module paths (of the
    output linears of a site: o, down).

    Every tensor that is coupled to a removed unit shrinks: weights, codes, scales, masks, deltas, biases, norms, and the
    sizes in reshapes; see `bmgraph.analysis.coupling.coupled_dims`. Heads that share keys and values are removed together.
    The result computes what the whole program would with those units set to zero, unless a norm or a dynamic rounding runs
    over them. A site is declined where some operator needs all of its units.

    The error depends on how much the model relies on what was removed; it is near its maximum on an untrained model, or
    without training afterwards. The default bound only rejects what is worse than an unrelated output (1.4).

    Raises PassError where a glob matches nothing, or nothing could be removed anywhere. Sources: Michel et al. 2019
    (arXiv:1905.10650), Fang et al. 2023 (arXiv:2301.12900).

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import Shrink
        >>> layer = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> program = bg.capture(layer, (torch.randn(3, 4),))
        >>> bg.Pipeline([Shrink(ffn=0.25)]).run(program).parameters["0.weight"].shape
        torch.Size([6, 4])
    """

    effect: ClassVar[Effect] = "approximate"
    provides: ClassVar[frozenset[str]] = frozenset({"shrunk"})
    default_drift: ClassVar[float] = 1.5

    ffn: float = 0.0
    heads: float = 0.0
    scope: str = "layer"
    score: str = "magnitude"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, what in (("ffn", "neuron"), ("heads", "head")):
            share = getattr(self, name)
            if not 0 <= share < 1:
                raise InputError(f"{name}={share}: leaves no {what}; give a share from 0 to below 1")
        if not self.ffn and not self.heads:
            raise InputError("give a share of neurons (ffn=0.25), of heads (heads=0.25), or both")
        if self.scope not in SCOPES:
            raise InputError(f"scope={self.scope!r}: choose one of {', '.join(SCOPES)}")
        if self.score not in SCORES:
            raise InputError(f"score={self.score!r}: choose one of {', '.join(SCORES)}")

    def fits(self, program: Program, context: Context) -> bool:
        """Whether the shares are at least one neuron or head of a site that is asked for."""
        sites, _, _ = self._sites(program, find(program), context)
        if self.scope == "layer":
            return any(min(share_of(self._share(site), site.count), site.count - 1) > 0 for site in sites)
        kinds = {site.kind: self._share(site) for site in sites}
        counts = {kind: sum(site.count for site in sites if site.kind == kind) for kind in kinds}
        return any(share_of(share, counts[kind]) > 0 for kind, share in kinds.items())

    def run(self, program: Program, context: Context) -> Program:
        """Choose units in all sites of a kind before any of them is removed."""
        structure = find(program)
        sites, include, exclude = self._sites(program, structure, context)
        for name, unknown in unknown_sites(program, structure).items():
            asked = self.ffn if unknown.kind == NEURONS else self.heads
            if asked and matches(name, include) and not matches(name, exclude):
                context.declined(name, unknown.why)
        spread_sites = _spread_sites(program, sites, context)
        for kind in ("neurons", "heads"):
            self._remove(program, context, [item for item in spread_sites if item.site.kind == kind])
        # A delta that was trained on the whole model, or with other heads, must be rejected.
        program.fingerprint = fingerprint(backbone_of(program))
        return program

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """It must compute what the program computes with the removed units set to zero."""
        if not depends_on_count(before, after):
            expected = silenced(before, after, [edit.tensors for edit in context.edits])
            proof.same(expected, after, "it is not the program with what was removed set to zero", slack=10)

    def _sites(
        self, program: Program, structure: Structure, context: Context
    ) -> tuple[list[_Site], tuple[str, ...], tuple[str, ...]]:
        """The sites that are asked for, and the resolved globs."""
        sites = _neuron_sites(program, structure) if self.ffn else []
        sites += _head_sites(program, structure, context) if self.heads else []
        include = resolve_patterns(self.include, [site.name for site in sites], "include")
        exclude = resolve_patterns(self.exclude, [site.name for site in sites], "exclude")
        asked = [site for site in sites if matches(site.name, include) and not matches(site.name, exclude)]
        return asked, include, exclude

    def _share(self, site: _Site) -> float:
        return self.ffn if site.kind == "neurons" else self.heads

    def _remove(self, program: Program, context: Context, spread_sites: list[_SpreadSite]) -> None:
        if not spread_sites:
            return
        share = self._share(spread_sites[0].site)
        scores = [
            SCORES[self.score](program, units.spread, units.site.count).tolist() for units in spread_sites
        ]
        for units, removed in zip(spread_sites, _lowest_scored(scores, share, self.scope)):
            if not removed:
                context.declined(
                    units.site.name, f"{share:g} of its {units.site.text(units.site.count)} rounds to zero"
                )
                continue
            before = {name: list(program.tensor(name).shape) for name in _tensors(program, units.spread)}
            tensors = [str(node.target) for node, _ in units.spread.labels if node.op == "get_attr"]
            remove_units(program, units.spread, removed, str(self), units.site.name)
            changed = ", ".join(
                f"{name} {shape} -> {list(program.tensor(name).shape)}" for name, shape in before.items()
            )
            left = units.site.count - len(removed)
            context.edited(
                units.site.name,
                f"{left * units.site.members} of {units.site.text(units.site.count)}: {changed}",
                tensors,
            )


@dataclass(frozen=True)
class _Site:
    """A feed-forward or an attention.

    `name` is the weight of `output_linear`. `seed` are the outputs of `input_linear` that define the units, `unit_size` of
    them for each unit. A unit is `members` neurons or heads.
    """

    kind: str
    name: str
    seed: Part
    unit_size: int
    members: int
    input_linear: fx.Node
    output_linear: fx.Node

    @property
    def count(self) -> int:
        """The number of units."""
        return self.seed.size // self.unit_size

    def text(self, units: int) -> str:
        """A number of units in words."""
        return f"{units * self.members} {self.kind}"

    def seeds(self) -> dict[DimRef, Labels]:
        """The unit of each output of `input_linear`."""
        width = int(self.input_linear.meta["val"].shape[-1])
        labels = torch.full((width,), NONE)
        rows = torch.cat([torch.arange(*run) for run in self.seed.runs])
        labels[rows] = torch.arange(len(rows)) // self.unit_size
        return {(self.input_linear, self.input_linear.meta["val"].dim() - 1): labels}


@dataclass(frozen=True)
class _SpreadSite:
    """A site and the dimensions that its units spread to."""

    site: _Site
    spread: Spread


def _neuron_sites(program: Program, structure: Structure) -> list[_Site]:
    """One site for each feed-forward."""
    first_use = _first_uses(program, structure)
    sites = []
    for feedforward in structure.feedforwards:
        unit_size = GROUP if _is_masked(first_use[feedforward.down]) else 1
        sites.append(
            _Site(
                "neurons",
                feedforward.down,
                feedforward.up,
                unit_size,
                unit_size,
                first_use[feedforward.up.linear],
                first_use[feedforward.down],
            )
        )
    return sites


def _head_sites(program: Program, structure: Structure, context: Context) -> list[_Site]:
    """One site for each attention whose heads are equal parts of a linear's outputs."""
    first_use = _first_uses(program, structure)
    sites = []
    for attention in structure.attentions:
        shared = attention.kv_heads > 1
        seed, unit_size = (attention.k or attention.v) if shared else attention.q, attention.head_size
        if attention.o is None or seed is None or seed.size % unit_size:
            context.declined(attention.path, "its heads are not equal parts of the outputs of a linear")
        elif _is_masked(first_use[attention.o]) and unit_size % GROUP:
            context.declined(
                attention.o,
                f"its head size {unit_size} is not a multiple of the groups of 4 of its sparsity pattern",
            )
        else:
            members = attention.heads // attention.kv_heads if shared else 1
            sites.append(
                _Site(
                    "heads",
                    attention.o,
                    seed,
                    unit_size,
                    members,
                    first_use[seed.linear],
                    first_use[attention.o],
                )
            )
    return sites


def _first_uses(program: Program, structure: Structure) -> dict[str, fx.Node]:
    """The first use of each linear, by the name of its weight."""
    nodes = {node.name: node for node in program.graph.nodes}
    return {item.name: nodes[item.uses[0].node] for item in structure.linears}


def _is_masked(linear: fx.Node) -> bool:
    """Whether the weight of a linear is computed with a mask (a bool parameter)."""
    stack: list[fx.Node] = [linear.args[1]]  # type: ignore[list-item]
    while stack:
        node = stack.pop()
        if node.op == "get_attr" and node.meta["val"].dtype == torch.bool:
            return True
        stack.extend(node.all_input_nodes)
    return False


def _spread_sites(program: Program, sites: Sequence[_Site], context: Context) -> list[_SpreadSite]:
    """Spread the units of each site. Sites that share a tensor shrink as one; only the first is returned."""
    coupling = Coupling(program)
    spread_sites: list[_SpreadSite] = []
    for site in sites:
        seeds = site.seeds()
        partner = next((units for units in spread_sites if units.spread.labels.keys() & seeds.keys()), None)
        if partner is not None:
            context.declined(site.name, f"it shrinks together with {partner.site.name}")
            continue
        try:
            spread = coupling.spread(seeds)
        except CouplingError as reason:
            context.declined(site.name, str(reason))
            continue
        x: Any = site.output_linear.args[0]
        if (x, x.meta["val"].dim() - 1) not in spread.labels:
            context.declined(site.name, f"its inputs do not each belong to one of its {site.kind}")
            continue
        spread_sites.append(_SpreadSite(site, spread))
    return spread_sites


def _lowest_scored(scores: list[list[float]], share: float, scope: str) -> list[list[int]]:
    """For each site, the units with the lowest scores; one unit always stays."""
    ranked = [sorted(range(len(site)), key=site.__getitem__) for site in scores]
    if scope == "layer":
        return [order[: min(share_of(share, len(order)), len(order) - 1)] for order in ranked]
    ranking = sorted(
        (scores[index][unit], index, unit) for index, order in enumerate(ranked) for unit in order[:-1]
    )
    removed: list[list[int]] = [[] for _ in scores]
    for _, index, unit in ranking[: share_of(share, sum(map(len, scores)))]:
        removed[index].append(unit)
    return removed


def _matrices(program: Program, spread: Spread) -> list[DimRef]:
    """The weights of linears whose rows or columns belong to units."""
    weights: list[Any] = [node.args[1] for node in linears(program.graph)]
    dims = [(weight, dim) for weight in dict.fromkeys(weights) for dim in (0, 1)]
    return [item for item in dims if item in spread.labels and reads_no_input(item[0])]


def _squares(weight: torch.Tensor, dim: int, labels: Labels, units: int) -> torch.Tensor:
    """The sum of squares of each unit's part of a weight."""
    squares = weight.double().square().sum(1 - dim)
    if squares.device.type == "meta":
        return torch.ones(units, dtype=torch.double)
    labelled = labels != NONE
    return torch.zeros(units, dtype=torch.double).index_add_(0, labels[labelled], squares.cpu()[labelled])


def _tensors(program: Program, spread: Spread) -> list[str]:
    """The parameters of two or more dimensions that shrink."""
    readers = tensor_nodes(program.graph)
    return [
        name
        for name, node in readers.items()
        if node.meta["val"].dim() > 1
        and any((node, dim) in spread.labels for dim in range(node.meta["val"].dim()))
    ]
