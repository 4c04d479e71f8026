"""The sites that Shrink removes units from: which rows of which linears define a neuron, a head, or a feature of heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from bmgraph.analysis.coupling.coupled_dims import NONE, Coupling, CouplingError, Labels, Spread
from bmgraph.analysis.coupling.op_rules import DimRef, rank
from bmgraph.analysis.structure.sites import Attention, Part, Structure
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context

GROUP = 4
"""Neurons are removed four at a time if the weight that reads them is masked: groups of a 2:4 pattern stay whole."""

NEURONS, HEADS, QUERIES, PAIRS, VALUES, CHANNELS = (
    "neurons", "heads", "queries", "pairs", "values", "channels",
)  # fmt: skip
"""Kinds of units: neurons of feed-forwards; heads of attentions, with the keys and values that they share; heads of queries
within each group that shares keys and values; features of queries and keys; features of values; channels of the residual stream."""

NOUNS = {
    QUERIES: "heads", PAIRS: "features of queries and keys", VALUES: "features of values",
}  # fmt: skip
"""What units of a kind consist of, where that is not the name of the kind."""


@dataclass(frozen=True)
class Site:
    """A part of the model with units of one kind.

    `name`: a parameter, which patterns are compared with. `seeds`: a dimension that defines the units, with the unit of each
    index. `members`: what each unit consists of. `reader`: the dimension that must belong to the units, that of the input of
    the site's output linear.
    """

    kind: str
    name: str
    seeds: dict[DimRef, Labels]
    members: tuple[int, ...]
    reader: DimRef | None = None

    @property
    def count(self) -> int:
        """The number of units."""
        return len(self.members)

    def text(self, removed: Sequence[int] = ()) -> str:
        """What the site has without some units, in words."""
        gone = sum(self.members[unit] for unit in removed)
        whole = sum(self.members)
        words = f"{whole} {NOUNS.get(self.kind, self.kind)}"
        return f"{whole - gone} of {words}" if removed else words


@dataclass(frozen=True)
class SpreadSite:
    """A site and the dimensions that its units spread to."""

    site: Site
    spread: Spread


def neuron_sites(program: Program, structure: Structure) -> list[Site]:
    """One site for each feed-forward."""
    first_use = _first_uses(program, structure)
    sites = []
    for feedforward in structure.feedforwards:
        down = first_use[feedforward.down]
        size = GROUP if is_masked(down) else 1
        seeds = _seeds(feedforward.up, first_use, torch.arange(feedforward.up.size) // size)
        members = (size,) * (feedforward.up.size // size)
        sites.append(Site(NEURONS, feedforward.down, seeds, members, _input(down)))
    return sites


def head_sites(program: Program, structure: Structure, context: Context) -> list[Site]:
    """One site for each attention whose heads are equal parts of a linear's outputs."""
    first_use = _first_uses(program, structure)
    sites = []
    for attention in structure.attentions:
        shared = attention.kv_heads > 1
        seed, size = (attention.k or attention.v) if shared else attention.q, attention.head_size
        o = _output(attention, seed, first_use, context)
        if o is None or seed is None:
            continue
        members = attention.heads // attention.kv_heads if shared else 1
        seeds = _seeds(seed, first_use, torch.arange(seed.size) // size)
        sites.append(Site(HEADS, attention.o or "", seeds, (members,) * (seed.size // size), _input(o)))
    return sites


def query_sites(program: Program, structure: Structure, context: Context) -> list[Site]:
    """One site for each attention in which several heads of queries share keys and values: a unit is one head of every group."""
    first_use = _first_uses(program, structure)
    sites = []
    for attention in structure.attentions:
        size, groups = attention.head_size, attention.kv_heads
        o = _output(attention, attention.q, first_use, context)
        if o is None or attention.q is None:
            continue
        if attention.heads <= groups or attention.heads % groups:
            context.declined(
                attention.o or attention.path,
                "no keys and values are shared by several of its heads: shrink its heads (heads=)",
            )
            continue
        share = attention.heads // groups
        seeds = _seeds(attention.q, first_use, torch.arange(attention.q.size) // size % share)
        sites.append(Site(QUERIES, attention.o or "", seeds, (groups,) * share, _input(o)))
    return sites


def pair_sites(program: Program, structure: Structure, context: Context) -> list[Site]:
    """One site for each attention: the features that its queries and keys are compared in, the same ones for all heads.

    Those that some operator mixes, such as the pairs of rotary embeddings, are one unit.
    """
    first_use, coupling = _first_uses(program, structure), Coupling(program)
    sites = []
    for attention in structure.attentions:
        size = attention.head_size
        if attention.q is None or attention.k is None or attention.o is None or attention.q.size % size:
            context.declined(
                attention.path, "its queries and keys are not equal parts of the outputs of linears"
            )
            continue
        try:
            seeds = coupling.inseparable(
                _seeds(attention.q, first_use, torch.arange(attention.q.size) % size)
            )
        except CouplingError as reason:
            context.declined(attention.o, f"features of its queries and keys: {reason}")
            continue
        ((_, labels),) = seeds.items()
        counts = torch.bincount(labels[labels != NONE]) // (attention.q.size // size)
        sites.append(Site(PAIRS, attention.o, seeds, tuple(counts.tolist())))
    return sites


def value_sites(program: Program, structure: Structure, context: Context) -> list[Site]:
    """One site for each attention: the features of its values, the same ones for all heads."""
    first_use = _first_uses(program, structure)
    sites = []
    for attention in structure.attentions:
        v, o = attention.v, attention.o
        if v is None or o is None or v.size % attention.kv_heads:
            context.declined(attention.path, "its values are not equal parts of the outputs of a linear")
            continue
        size = v.size // attention.kv_heads
        unit = GROUP if is_masked(first_use[o]) else 1
        if size % unit:
            context.declined(
                o,
                f"the {size} features of its values are not a multiple of the groups of 4 of its sparsity pattern",
            )
            continue
        seeds = _seeds(v, first_use, torch.arange(v.size) % size // unit)
        sites.append(Site(VALUES, o, seeds, (unit,) * (size // unit), _input(first_use[o])))
    return sites


def spread_sites(coupling: Coupling, sites: Sequence[Site], context: Context) -> list[SpreadSite]:
    """Spread the units of each site. Sites that share a tensor shrink as one; only the first is returned."""
    found: list[SpreadSite] = []
    for site in sites:
        partner = next((one for one in found if one.spread.labels.keys() & site.seeds.keys()), None)
        if partner is not None:
            context.declined(site.name, f"it shrinks together with {partner.site.name}")
            continue
        if site.count < 2:
            context.declined(site.name, f"one of its {NOUNS.get(site.kind, site.kind)} is left, which stays")
            continue
        try:
            spread = coupling.spread(site.seeds)
        except CouplingError as reason:
            context.declined(site.name, str(reason))
            continue
        if site.reader is not None and site.reader not in spread.labels:
            context.declined(
                site.name, f"its inputs do not each belong to one of its {NOUNS.get(site.kind, site.kind)}"
            )
            continue
        found.append(SpreadSite(site, spread))
    return found


def is_masked(linear: fx.Node) -> bool:
    """Whether the weight of a linear is computed with a mask (a bool parameter)."""
    stack: list[fx.Node] = [linear.args[1]]  # type: ignore[list-item]
    while stack:
        node = stack.pop()
        if node.op == "get_attr" and node.meta["val"].dtype == torch.bool:
            return True
        stack.extend(node.all_input_nodes)
    return False


def _output(
    attention: Attention, seed: Part | None, first_use: dict[str, fx.Node], context: Context
) -> fx.Node | None:
    """The output linear of an attention whose heads can be removed; else it is declined."""
    size = attention.head_size
    if attention.o is None or seed is None or seed.size % size:
        context.declined(attention.path, "its heads are not equal parts of the outputs of a linear")
        return None
    if is_masked(first_use[attention.o]) and size % GROUP:
        context.declined(
            attention.o, f"its head size {size} is not a multiple of the groups of 4 of its sparsity pattern"
        )
        return None
    return first_use[attention.o]


def _seeds(part: Part, first_use: dict[str, fx.Node], units: torch.Tensor) -> dict[DimRef, Labels]:
    """The unit of each output of the linear that a part is of, given those of the part's outputs."""
    linear = first_use[part.linear]
    labels = torch.full((int(linear.meta["val"].shape[-1]),), NONE)
    labels[torch.cat([torch.arange(*run) for run in part.runs])] = units
    return {(linear, rank(linear) - 1): labels}


def _input(linear: fx.Node) -> DimRef:
    """The features that a linear reads."""
    x = linear.args[0]
    assert isinstance(x, fx.Node)
    return x, rank(x) - 1


def _first_uses(program: Program, structure: Structure) -> dict[str, fx.Node]:
    """The first use of each linear, by the name of its weight."""
    nodes = {node.name: node for node in program.graph.nodes}
    return {item.name: nodes[item.uses[0].node] for item in structure.linears}
