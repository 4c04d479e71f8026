"""The pass Shrink: its options, which neurons and heads it scores, and which it removes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from bmgraph.analysis.coupling.coupled_dims import Coupling, Spread
from bmgraph.analysis.site_filter import matches, resolve_patterns
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.layer_blocks import Block, layer_blocks
from bmgraph.analysis.structure.sites import Structure
from bmgraph.analysis.structure.unknown_sites import NEURONS as UNKNOWN_NEURONS
from bmgraph.analysis.structure.unknown_sites import unknown_sites
from bmgraph.deltas.backbone import backbone_of
from bmgraph.errors import InputError, PassError
from bmgraph.ir.node_role import NodeRole, has_role
from bmgraph.ir.program import Program, tensor_nodes
from bmgraph.ir.shape_inference import propagate
from bmgraph.pass_manager.context import CALIBRATION, Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.shrink.gates import closed_units, fold_gates, gated_values
from bmgraph.passes.shrink.layer_gates import fold_layer_gates, gated_layers
from bmgraph.passes.shrink.layers import numbered_layers, redundant_layers, remove_layers
from bmgraph.passes.shrink.silenced import silenced
from bmgraph.passes.shrink.sites import (
    CHANNELS,
    HEADS,
    NEURONS,
    PAIRS,
    QUERIES,
    VALUES,
    Site,
    SpreadSite,
    head_sites,
    neuron_sites,
    pair_sites,
    query_sites,
    spread_sites,
    value_sites,
)
from bmgraph.passes.shrink.slice_program import remove_units
from bmgraph.passes.shrink.stream import stream_sites
from bmgraph.passes.shrink.unit_scores import (
    ACTIVATION,
    GATES,
    MAGNITUDE,
    RANDOM,
    SCORES,
    TAYLOR,
    unit_scores,
)
from bmgraph.utils.digest import fingerprint
from bmgraph.utils.share import share_of
from bmgraph.verify.proof import Proof
from bmgraph.verify.unnamed_changes import DROPOUT

SHARES = {
    "ffn": "neuron",
    "heads": "head",
    "queries": "head of queries",
    "head_size": "feature of heads",
    "hidden": "channel",
    "layers": "layer",
}
"""Option -> what a share of 1 would leave none of."""

OPTIONS = {
    NEURONS: "ffn",
    HEADS: "heads",
    QUERIES: "queries",
    PAIRS: "head_size",
    VALUES: "head_size",
    CHANNELS: "hidden",
}
"""Kind of units -> the option that says which share of them goes."""

SCOPES = ("layer", "global")

Wanted = Callable[[str], bool]


@dataclass(frozen=True, repr=False)
class Shrink(ModelPass):
    """Remove the given shares of neurons, heads, features of heads, channels of the hidden state, and layers.

    ffn: neurons of feed-forwards. heads: heads of attentions; those that share keys and values (a group of grouped-query
    attention) go together with these. queries: heads of queries within each group, the same ones of all groups; keys and values
    stay. head_size: features in which queries and keys are compared, in whole rotary pairs and with the scale of scores as it
    was, and features of values; the same ones for all heads of an attention. hidden: channels of the residual stream, in
    embeddings, norms, linears and heads of the model. layers: whole layers, or the numbers of those that go, counted through all
    stacks. Shares are from 0 to below 1, and one of a kind always stays.

    scope: "layer" removes the share in each site (of layers: in each stack); "global" ranks the units of all sites of a kind
    together, so that layers may end up with different sizes. score: "magnitude" (of all weights that belong to a unit),
    "activation" (what it adds to the outputs of the linears that read it), "taylor" (|gradient x value|, for a program with a
    loss) or "random" with `seed`, as a control; the second and third read calibration data. A share of layers goes by redundancy,
    the cosine of what enters and leaves a layer on calibration data (Men et al. 2024, arXiv:2403.03853), unless the score is
    "taylor" or "random"; the history records their numbers, so that a replay does not measure again. include, exclude: globs
    over module paths (of the output linears of a site: o, down; of layers); they do not concern `hidden` and numbers of layers.

    score "gates" takes no shares: the neurons, heads and layers go whose gates (`L0`) training has closed, and the weights that read the others
    are multiplied by their gates, so that the result computes what the program does with gates at their deterministic values.

    Every tensor that is coupled to a removed unit shrinks: weights, codes, scales, masks, deltas, biases, norms, and the
    sizes in reshapes; see `bmgraph.analysis.coupling.coupled_dims`. The result computes what the whole program would with those
    units set to zero, unless a norm or a dynamic rounding runs over them: a norm sees what is kept alone. A site is declined where
    some operator needs all of its units. Outputs keep their size: a channel of an output that is gone is zero.

    The error depends on how much the model relies on what was removed; it is near its maximum on an untrained model, or
    without training afterwards. The default bound only rejects what is worse than an unrelated output (1.4).

    Raises PassError where a glob matches nothing, a layer is not there or cannot be left out, no layer stays, or nothing could be
    removed anywhere; ResourceError without calibration data where it is read. Sources: Michel et al. 2019
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
    saves: ClassVar[bool] = True

    ffn: float = 0.0
    heads: float = 0.0
    scope: str = "layer"
    score: str = MAGNITUDE
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    queries: float = 0.0
    head_size: float = 0.0
    hidden: float = 0.0
    layers: float | tuple[int, ...] = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, what in SHARES.items():
            share = getattr(self, name)
            if not isinstance(share, tuple) and not 0 <= share < 1:
                numbers = f", or the numbers of layers, as in layers=[{share:g}]" if name == "layers" else ""
                wrong = f"leaves no {what}" if share >= 1 else "that is no share"
                raise InputError(f"{name}={share}: {wrong}; give a share from 0 to below 1{numbers}")
        if self.score == GATES:
            if any(getattr(self, name) for name in SHARES):
                raise InputError(f"score={GATES!r}: the gates say what goes; leave {', '.join(SHARES)} out")
        elif not any(getattr(self, name) for name in SHARES):
            raise InputError(
                "give a share of neurons (ffn=0.25), of heads (heads=0.25), or both; or of queries=, head_size=, hidden=, layers="
            )
        if isinstance(self.layers, tuple) and (
            min(self.layers) < 0 or len(set(self.layers)) < len(self.layers)
        ):
            raise InputError(f"layers={list(self.layers)}: number layers from 0 on, and each once")
        if self.scope not in SCOPES:
            raise InputError(f"scope={self.scope!r}: choose one of {', '.join(SCOPES)}")
        if self.score not in SCORES:
            raise InputError(f"score={self.score!r}: choose one of {', '.join(SCORES)}")

    @property
    def resources(self) -> tuple[str, ...]:
        """Calibration data, where what is removed is measured."""
        measures = self.score in (ACTIVATION, TAYLOR)
        return (CALIBRATION,) if measures or self._ranks_by_redundancy else ()

    @property
    def required(self) -> frozenset[str]:
        """Gates, where they say what goes."""
        return frozenset({"gated"}) if self.score == GATES else self.requires

    @property
    def declared(self) -> frozenset[str]:
        """The dropout of layers goes with them."""
        return self.changes | ({DROPOUT} if self.layers or self.score == GATES else frozenset())

    def fits(self, program: Program, context: Context) -> bool:
        """Whether the shares are at least one unit of a site that is asked for."""
        if self.score == GATES:
            return bool(gated_values(program) or gated_layers(program))
        structure = find(program)
        wanted = self._wanted(structure)
        counts: dict[str, list[int]] = {}
        for site in self._sites(program, structure, wanted, context):
            counts.setdefault(site.kind, []).append(site.count)
        for kind, found in counts.items():
            share = self._share(kind)
            each = [min(share_of(share, count), count - 1) for count in found]
            if (share_of(share, sum(found)) if self.scope == "global" else max(each)) > 0:
                return True
        whole = (self.layers or self.hidden) and structure.layers
        return bool(whole or ((self.queries or self.head_size) and structure.attentions))

    def run(self, program: Program, context: Context) -> Program:
        """Choose units in all sites of a kind before any of them is removed: layers, channels, neurons and heads, what heads
        consist of."""
        structure = find(program)
        wanted = self._wanted(structure)
        if self.score == GATES:
            self._remove_closed(program, context, wanted)
            program.fingerprint = fingerprint(backbone_of(program))
            return program
        for name, unknown in unknown_sites(program, structure).items():
            asked = self.ffn if unknown.kind == UNKNOWN_NEURONS else self.heads
            if asked and wanted(name):
                context.declined(name, unknown.why)
        if self.layers:
            self._remove_layers(program, context, wanted)
        if self.hidden:
            self._remove(program, context, stream_sites(program, find(program), context))
        sites = self._sites(program, find(program), wanted, context)
        self._remove_spread(program, context, sites)
        for share, sites_of in (
            (self.queries, query_sites),
            (self.head_size, pair_sites),
            (self.head_size, value_sites),
        ):
            if share:  # each shares rows of weights with the one before
                sites = [item for item in sites_of(program, find(program), context) if wanted(item.name)]
                self._remove_spread(program, context, sites)
        # A delta that was trained on the whole model, or with other heads, must be rejected.
        program.fingerprint = fingerprint(backbone_of(program))
        return program

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """It must compute what the program, without the layers, computes with the removed units set to zero."""
        if self.score == GATES:
            proof.same(before, after, "it is not the program with its gates at their values", slack=10)
            return
        if self.layers:
            gone = {edit.site for edit in context.edits if not edit.tensors}
            before = before.clone()
            blocks = [item for item in layer_blocks(before) if isinstance(item, Block) and item.path in gone]
            remove_layers(before, blocks, str(self))
            propagate(before)
        if self.hidden and _cuts(after) != _cuts(before):
            return  # an input that is added to the hidden state is whole in `before`
        expected = silenced(before, after, [edit.tensors for edit in context.edits if edit.tensors])
        if expected is not None:
            proof.same(expected, after, "it is not the program with what was removed set to zero", slack=10)

    @property
    def _ranks_by_redundancy(self) -> bool:
        return isinstance(self.layers, float) and self.layers > 0 and self.score not in (TAYLOR, RANDOM)

    def _wanted(self, structure: Structure) -> Wanted:
        """Whether a site is asked for, by the parameter of its output linear or by the path of its layer."""
        gated = self.score == GATES
        names = [item.down for item in structure.feedforwards] if self.ffn or gated else []
        if gated or self.heads or self.queries or self.head_size:
            names += [item.o for item in structure.attentions if item.o]
        names += [layer.path for layer in structure.layers] if self.layers or gated else []
        include = resolve_patterns(self.include, names, "include")
        exclude = resolve_patterns(self.exclude, names, "exclude")
        return lambda name: matches(name, include) and not matches(name, exclude)

    def _sites(self, program: Program, structure: Structure, wanted: Wanted, context: Context) -> list[Site]:
        """The feed-forwards and attentions whose neurons and heads are asked for."""
        sites = neuron_sites(program, structure) if self.ffn else []
        sites += head_sites(program, structure, context) if self.heads else []
        return [site for site in sites if wanted(site.name)]

    def _share(self, kind: str) -> float:
        share: float = getattr(self, OPTIONS[kind])
        return share

    def _remove_closed(self, program: Program, context: Context, wanted: Wanted) -> None:
        """Remove the layers whose gates are 0, fold other gates into weights, then remove the units whose gates are 0."""
        fold_layer_gates(program, context, str(self), wanted)
        values, changed = fold_gates(program, str(self), wanted)
        structure = find(program)
        sites = [*neuron_sites(program, structure), *head_sites(program, structure, context)]
        found = spread_sites(Coupling(program), [site for site in sites if site.name in values], context)
        for site in values.keys() - {item.site.name for item in found}:
            context.edited(site, "its gates are folded into its weights", changed[site])
        for item, removed in zip(found, list(closed_units(found, values))):
            tensors = changed[item.site.name]
            if removed:
                self._remove_units(program, context, item, removed, 0.0, tensors)
            else:
                context.edited(item.site.name, f"none of its {item.site.text()} is closed", tensors)

    def _remove_layers(self, program: Program, context: Context, wanted: Wanted) -> None:
        if gated_layers(program):
            raise PassError(
                f"layers={self.layers}: layers have gates, which say what goes: Shrink(score={GATES!r})"
            )
        if isinstance(self.layers, tuple):
            blocks, said = numbered_layers(program, self.layers), ["as asked"] * len(self.layers)
        else:
            if program.device.type == "meta" and self.score != RANDOM:
                raise PassError(
                    f"layers={self.layers}: redundancy is measured, and a program on the meta device has no values: give it "
                    "weights first, or the numbers of layers"
                )
            with context.searching():
                blocks, said = redundant_layers(
                    program, self.layers, self.scope, wanted, self.score, self.seed, context
                )
            if blocks:
                context.settle(replace(self, layers=tuple(sorted(block.number for block in blocks))))
        remove_layers(program, blocks, str(self))
        propagate(program)
        for block, why in sorted(zip(blocks, said), key=lambda item: item[0].number):
            context.edited(block.path, f"layer {block.number} removed: {why}")

    def _remove_spread(self, program: Program, context: Context, sites: list[Site]) -> None:
        self._remove(program, context, spread_sites(Coupling(program), sites, context) if sites else [])

    def _remove(self, program: Program, context: Context, found: list[SpreadSite]) -> None:
        """Remove units of all sites, those of each kind ranked together."""
        scores = unit_scores(self.score, program, found, self.seed, context) if found else []
        for kind in dict.fromkeys(item.site.kind for item in found):
            chosen = [place for place, item in enumerate(found) if item.site.kind == kind]
            share = self._share(kind)
            lowest = _lowest_scored([scores[place].tolist() for place in chosen], share, self.scope)
            for place, removed in zip(chosen, lowest):
                self._remove_units(program, context, found[place], removed, share)

    def _remove_units(
        self,
        program: Program,
        context: Context,
        units: SpreadSite,
        removed: list[int],
        share: float,
        also: Sequence[str] = (),
    ) -> None:
        site, spread = units.site, units.spread
        if not removed:
            context.declined(site.name, f"{share:g} of its {site.text()} rounds to zero")
            return
        before = {name: list(program.tensor(name).shape) for name in _tensors(program, spread)}
        tensors = [str(node.target) for node, _ in spread.labels if node.op == "get_attr"]
        remove_units(program, spread, removed, str(self), site.name)
        changed = ", ".join(
            f"{name} {shape} -> {list(program.tensor(name).shape)}" for name, shape in before.items()
        )
        context.edited(site.name, f"{site.text(removed)}: {changed}", dict.fromkeys([*tensors, *also]))


def _cuts(program: Program) -> int:
    """How many values are whole and read in part."""
    return sum(has_role(node, NodeRole.KEPT) for node in program.graph.nodes)


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


def _tensors(program: Program, spread: Spread) -> list[str]:
    """The parameters of two or more dimensions that shrink."""
    readers = tensor_nodes(program.graph)
    return [
        name
        for name, node in readers.items()
        if node.meta["val"].dim() > 1
        and any((node, dim) in spread.labels for dim in range(node.meta["val"].dim()))
    ]
