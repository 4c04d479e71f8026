"""Shrink: fewer neurons in feed-forwards and fewer heads in attentions, in tensors that are really smaller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from bmgraph.analysis.coupling.coupled_dims import NONE, Coupling, CouplingError, Labels, Spread
from bmgraph.analysis.coupling.op_rules import DimRef
from bmgraph.analysis.interpreter import evaluate, reads_no_input
from bmgraph.analysis.site_filter import check_patterns, matches
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.sites import Part, Structure
from bmgraph.analysis.weight_sites import linears
from bmgraph.deltas.low_rank import backbone_of
from bmgraph.errors import InputError, PassError
from bmgraph.ir.program import Program, tensor_nodes
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, Pass
from bmgraph.passes.shrink.slice_program import take_out
from bmgraph.utils.digest import fingerprint

GROUP = 4
"""Neurons go four at a time where the weight that reads them is masked: the groups of a 2:4 pattern stay whole."""

Score = Callable[[Program, Spread, int], torch.Tensor]
"""A program, what belongs to the units of a site, and how many they are -> what each of them is worth, f[units]."""


def magnitude(program: Program, spread: Spread, units: int) -> torch.Tensor:
    """The share of the squares of all coupled matrices that is a unit's, times the number of units: 1 on average.

    Every matrix counts as much as any other, so that a score can be compared between sites.
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
class Shrink(Pass):
    """Take the given shares of the neurons of feed-forwards and of the heads of attentions out of a program.

    ffn, heads: shares from 0 to below 1; at least one neuron and one head always stay. scope: "layer" takes the share of
    each site, "global" ranks those of all sites together, so that layers become uneven. score: "magnitude" (of all weights
    that a neuron or a head has). include, exclude: globs over module paths (of the linears that leave a site: o, down).

    What is taken out goes everywhere: rows and columns of weights, codes, scales, masks, deltas, biases, norms over them,
    and the sizes that reshapes name; see `bmgraph.analysis.coupling.coupled_dims`. Heads that share keys and values go together. What
    remains computes what the whole would with those neurons and heads silenced, unless a norm or a dynamic rounding runs
    over them. Neurons read by a weight with 2:4 groups go in fours. A site is declined where something needs all of it.

    Outputs move as far as the model relies on what was taken: nearly all on a model that was not trained, or is not
    trained afterwards. The default bound only stops what is further off than an unrelated output (1.4).

    Raises PassError where a glob fits nothing, or nothing could be taken out anywhere. Sources: Michel et al. 2019
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

    def run(self, program: Program, context: Context) -> Program:
        """Decide on all sites first, then take out."""
        if len(program.graphs) > 1:
            raise PassError(
                "a program of several graphs cannot be shrunk: shrink it before it is taken apart"
            )
        structure = find(program)
        wanted = _neurons(program, structure) if self.ffn else []
        wanted += _heads(program, structure, context) if self.heads else []
        check_patterns((*self.include, *self.exclude), [site.name for site in wanted], "include or exclude")
        wanted = [s for s in wanted if matches(s.name, self.include) and not matches(s.name, self.exclude)]
        found = _spread(program, wanted, context)
        for kind in ("neurons", "heads"):
            self._take(program, context, [unit for unit in found if unit.site.kind == kind])
        # A delta that was trained on the whole, or on other heads, must not fit.
        program.fingerprint = fingerprint(backbone_of(program))
        return program

    def _share(self, site: _Site) -> float:
        return self.ffn if site.kind == "neurons" else self.heads

    def _take(self, program: Program, context: Context, found: list[_Units]) -> None:
        if not found:
            return
        share = self._share(found[0].site)
        scores = [SCORES[self.score](program, units.spread, units.site.count).tolist() for units in found]
        for units, removed in zip(found, _least(scores, share, self.scope)):
            if not removed:
                context.declined(
                    units.site.name, f"{share:g} of its {units.site.text(units.site.count)} is none"
                )
                continue
            before = {name: list(program.tensor(name).shape) for name in _tensors(program, units.spread)}
            take_out(program, units.spread, removed, str(self), units.site.name)
            changed = ", ".join(
                f"{name} {shape} -> {list(program.tensor(name).shape)}" for name, shape in before.items()
            )
            left = units.site.count - len(removed)
            context.edited(
                units.site.name, f"{left * units.site.each} of {units.site.text(units.site.count)}: {changed}"
            )


@dataclass(frozen=True)
class _Site:
    """A feed-forward or an attention: `name` is the weight that leaves it, `seed` the outputs of a linear that its units
    are told from, `size` how many of them are one unit, `each` how many neurons or heads a unit is. `start` is that linear,
    `exit` the one that leaves."""

    kind: str
    name: str
    seed: Part
    size: int
    each: int
    start: fx.Node
    exit: fx.Node

    @property
    def count(self) -> int:
        """How many units there are."""
        return self.seed.size // self.size

    def text(self, units: int) -> str:
        """So many units in words."""
        return f"{units * self.each} {self.kind}"

    def seeds(self) -> dict[DimRef, Labels]:
        """Every output's unit."""
        width = int(self.start.meta["val"].shape[-1])
        labels = torch.full((width,), NONE)
        rows = torch.cat([torch.arange(*run) for run in self.seed.runs])
        labels[rows] = torch.arange(len(rows)) // self.size
        return {(self.start, self.start.meta["val"].dim() - 1): labels}


@dataclass(frozen=True)
class _Units:
    """The units of a site and all that belongs to them."""

    site: _Site
    spread: Spread


def _neurons(program: Program, structure: Structure) -> list[_Site]:
    """The feed-forwards."""
    first = _first_uses(program, structure)
    sites = []
    for dense in structure.feedforwards:
        size = GROUP if _is_masked(first[dense.down]) else 1
        sites.append(
            _Site("neurons", dense.down, dense.up, size, size, first[dense.up.linear], first[dense.down])
        )
    return sites


def _heads(program: Program, structure: Structure, context: Context) -> list[_Site]:
    """The attentions whose heads can be told apart."""
    first = _first_uses(program, structure)
    sites = []
    for attention in structure.attentions:
        shared = attention.kv_heads > 1
        seed, size = (attention.k or attention.v) if shared else attention.q, attention.head_size
        if attention.o is None or seed is None or seed.size % size:
            context.declined(attention.path, "its heads are no equal parts of the outputs of a linear")
        elif _is_masked(first[attention.o]) and size % GROUP:
            context.declined(attention.o, f"a head of {size} is no whole number of the groups of its pattern")
        else:
            each = attention.heads // attention.kv_heads if shared else 1
            sites.append(
                _Site("heads", attention.o, seed, size, each, first[seed.linear], first[attention.o])
            )
    return sites


def _first_uses(program: Program, structure: Structure) -> dict[str, fx.Node]:
    """The first use of every linear."""
    nodes = {node.name: node for node in program.graph.nodes}
    return {item.name: nodes[item.uses[0].node] for item in structure.linears}


def _is_masked(linear: fx.Node) -> bool:
    """Whether the weight of a linear is an expression with a mask, a bool parameter."""
    stack: list[fx.Node] = [linear.args[1]]  # type: ignore[list-item]
    while stack:
        node = stack.pop()
        if node.op == "get_attr" and node.meta["val"].dtype == torch.bool:
            return True
        stack.extend(node.all_input_nodes)
    return False


def _spread(program: Program, sites: Sequence[_Site], context: Context) -> list[_Units]:
    """What belongs to the units of each site; sites that share a tensor are one, and told of under the first's name."""
    coupling = Coupling(program)
    found: list[_Units] = []
    for site in sites:
        seeds = site.seeds()
        partner = next((units for units in found if units.spread.labels.keys() & seeds.keys()), None)
        if partner is not None:
            context.declined(site.name, f"it shrinks together with {partner.site.name}")
            continue
        try:
            spread = coupling.spread(seeds)
        except CouplingError as reason:
            context.declined(site.name, str(reason))
            continue
        x: Any = site.exit.args[0]
        if (x, x.meta["val"].dim() - 1) not in spread.labels:
            context.declined(site.name, f"its {site.kind} do not reach it one by one")
            continue
        found.append(_Units(site, spread))
    return found


def _least(scores: list[list[float]], share: float, scope: str) -> list[list[int]]:
    """For every site the units that are worth least; one always stays."""
    ranked = [sorted(range(len(site)), key=site.__getitem__) for site in scores]
    if scope == "layer":
        return [order[: min(int(share * len(order)), len(order) - 1)] for order in ranked]
    every = sorted(
        (scores[place][unit], place, unit) for place, order in enumerate(ranked) for unit in order[:-1]
    )
    removed: list[list[int]] = [[] for _ in scores]
    for _, place, unit in every[: int(share * sum(map(len, scores)))]:
        removed[place].append(unit)
    return removed


def _matrices(program: Program, spread: Spread) -> list[DimRef]:
    """The weights of linears that units are rows or columns of."""
    weights: list[Any] = [node.args[1] for node in linears(program.graph)]
    places = [(weight, dim) for weight in dict.fromkeys(weights) for dim in (0, 1)]
    return [place for place in places if place in spread.labels and reads_no_input(place[0])]


def _squares(weight: torch.Tensor, dim: int, labels: Labels, units: int) -> torch.Tensor:
    """The sum of squares of each unit's part of a weight."""
    squares = weight.double().square().sum(1 - dim)
    if squares.device.type == "meta":
        return torch.ones(units, dtype=torch.double)
    own = labels != NONE
    return torch.zeros(units, dtype=torch.double).index_add_(0, labels[own], squares.cpu()[own])


def _tensors(program: Program, spread: Spread) -> list[str]:
    """The matrices among the parameters that units are parts of."""
    readers = tensor_nodes(program.graph)
    return [
        name
        for name, node in readers.items()
        if node.meta["val"].dim() > 1
        and any((node, dim) in spread.labels for dim in range(node.meta["val"].dim()))
    ]
