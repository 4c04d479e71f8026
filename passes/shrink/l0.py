"""L0: gates on neurons, heads and layers, which training closes until a given share of them is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from bmgraph.analysis.coupling.coupled_dims import Coupling
from bmgraph.analysis.site_filter import matches, resolve_patterns
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.layer_blocks import Block, NoBlock, layer_blocks
from bmgraph.deltas.lr_ratio import check_lr_ratio
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.ir.step_rules import GateTarget
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.shrink.gates import attach_gates, gated_values
from bmgraph.passes.shrink.layer_gates import attach_layer_gates, gated_layers
from bmgraph.passes.shrink.sites import HEADS, NEURONS, Site, head_sites, neuron_sites, spread_sites

LAYERS = "layers"
SHARES = {NEURONS: "ffn", HEADS: "heads", LAYERS: "layers"}
"""Kind of units -> the option that says which share of them is to be closed."""


@dataclass(frozen=True, repr=False)
class L0(ModelPass):
    """Put a trained gate on each neuron (`ffn`), each head (`heads`) and each layer (`layers`), of which training closes the given
    shares.

    Gates are hard concrete: random while the program trains, so that the task's own loss trains them too, and 1 in what this pass
    returns, which computes what it did. Train the program (`Distill`, or a trainer), then `Shrink(score="gates")` removes the units whose
    gates are closed, and multiplies weights by the others. The share is that of all sites together: layers may end up with
    different sizes. Heads that share keys and values have one gate. What follows a layer reads what leaves it times the
    gate, and what enters it times one minus the gate. Not for channels of the hidden state: norms run over those that are closed
    too, so that closed ones are not gone (`Shrink(hidden=0.25)`, then `Distill`).

    A Lagrangian drives the expected share of closed gates to the target, which rises from 0 over the first `warmup` steps; its
    multipliers ascend at `rate`, and the first starts again where the share has passed the target. It is added to whatever loss the program is trained on, and is not in the loss that a step
    reports. Gates learn at `lr_ratio` times the learning rate of the rest, without weight decay. include, exclude: globs over module
    paths of the output linears (o, down) and of layers.

    Raises PassError where a glob matches nothing or there is nothing to gate. Sources: Louizos et al. 2018 (arXiv:1712.01312);
    the Lagrangian: Wang et al. 2020 (arXiv:1910.04732), Xia et al. 2022 (arXiv:2204.00408).

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import L0, Distill, Shrink
        >>> layer = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> batches = [{"input": torch.randn(16, 4)} for _ in range(4)]
        >>> program = bg.capture(layer, batches[0])
        >>> passes = [L0(ffn=0.5, warmup=50), Distill(on="outputs", steps=200), Shrink(score="gates")]
        >>> shrunk = bg.Pipeline(passes).run(program, resources={"teacher": layer, "text": batches})
        >>> len(shrunk.parameters["0.weight"]) < 8
        True
    """

    effect: ClassVar[Effect] = "exact"
    provides: ClassVar[frozenset[str]] = frozenset({"gated"})

    not_options: ClassVar[Mapping[str, str]] = {
        "hidden": "channels of the hidden state have no gates, since norms run over closed channels too, so that removing them would change what "
        "is left; take Shrink(hidden=0.25), then Distill"
    }

    ffn: float = 0.0
    heads: float = 0.0
    warmup: int = 100
    rate: float = 0.1
    lr_ratio: float = 100.0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    layers: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in SHARES.values():
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: give a share to close, from 0 to below 1")
        if not (self.ffn or self.heads or self.layers):
            raise InputError(
                "give a share of neurons (ffn=0.5), of heads (heads=0.5), of layers (layers=0.25), or several"
            )
        if self.warmup < 0 or not 0 < self.rate < 1e6:
            raise InputError(
                f"warmup={self.warmup}, rate={self.rate}: give a number of steps, and a rate above 0"
            )
        check_lr_ratio(self.lr_ratio)

    def fits(self, program: Program, context: Context) -> bool:
        """Whether the program has units or layers that are asked for."""
        return bool(self._sites(program, context) or (self.layers and layer_blocks(program)))

    def run(self, program: Program, context: Context) -> Program:
        """Gate the units of all sites that are asked for."""
        sites = self._sites(program, context)
        known = layer_blocks(program) if self.layers else []
        names = [site.name for site in sites] + [item.path for item in known]
        include, exclude = (resolve_patterns(item, names, text) for item, text in
                            ((self.include, "include"), (self.exclude, "exclude")))  # fmt: skip
        sites = [site for site in sites if matches(site.name, include) and not matches(site.name, exclude)]
        gated = {item.site for item in gated_values(program)}
        for site in sites:
            if site.name in gated:
                context.declined(site.name, "it has gates already")
        sites = [site for site in sites if site.name not in gated]
        blocks = self._blocks(program, known, include, exclude, context)
        pairs: dict[str, list[tuple[str, str]]] = {}
        found = spread_sites(Coupling(program), sites, context)
        with program.edit(by=str(self)) as editor:
            for item in found:
                pairs.setdefault(item.site.kind, []).append(attach_gates(editor, item))
                context.edited(item.site.name, f"gates on {item.site.text()}")
            if blocks:
                pairs[LAYERS] = attach_layer_gates(editor, blocks)
                for block in blocks:
                    context.edited(block.path, "a gate on the layer")
        for kind, gates in pairs.items():
            rule = GateTarget(tuple(gates), getattr(self, SHARES[kind]), self.warmup, self.rate)
            program.step_rules = (*program.step_rules, rule)
            program.lr_factors |= {alpha: float(self.lr_ratio) for _, alpha in gates}
        return program

    def _blocks(
        self,
        program: Program,
        known: Sequence[Block | NoBlock],
        include: Sequence[str],
        exclude: Sequence[str],
        context: Context,
    ) -> list[Block]:
        """The layers that get a gate; one that cannot be left out is declined."""
        found = []
        gated = bool(gated_layers(program))
        for item in known:
            if not matches(item.path, include) or matches(item.path, exclude):
                continue
            if gated:
                context.declined(item.path, "layers have gates already")
            elif isinstance(item, NoBlock):
                context.declined(item.path, item.why)
            else:
                found.append(item)
        return found

    def _sites(self, program: Program, context: Context) -> list[Site]:
        """The feed-forwards and attentions whose neurons and heads are asked for."""
        structure = find(program)
        sites = neuron_sites(program, structure) if self.ffn else []
        return sites + (head_sites(program, structure, context) if self.heads else [])
