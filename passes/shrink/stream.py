"""The residual stream: the channels that all layers read and add to, from the embeddings to the heads of the model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from bmgraph.analysis.coupling.coupled_dims import Coupling, CouplingError, Spread
from bmgraph.analysis.coupling.op_rules import rank
from bmgraph.analysis.interpreter import reads_no_input
from bmgraph.analysis.structure.residual_stream import hidden_states
from bmgraph.analysis.structure.sites import Structure
from bmgraph.analysis.weight_sites import linears
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of
from bmgraph.pass_manager.context import Context
from bmgraph.passes.shrink.sites import CHANNELS, GROUP, Site, SpreadSite, is_masked


def stream_sites(program: Program, structure: Structure, context: Context) -> list[SpreadSite]:
    """One site for each residual stream: that of a decoder and that of its encoder are one where they share embeddings.

    A stream is what the outputs of attentions, feed-forwards and layers are added to. It has the name of the first parameter
    that belongs to its channels. Outputs of the program keep their size.
    """
    coupling = Coupling(program, tables=True)
    found: list[SpreadSite] = []
    reasons: set[str] = set()
    for node in _added(program, structure):
        ref = (node, rank(node) - 1)
        width = node.meta["val"].shape[-1]
        if any(ref in one.spread.labels for one in found) or not isinstance(width, int):
            continue
        try:
            spread = coupling.spread({ref: torch.arange(width)}, keep_outputs=True)
            if not _has_residual_sum(spread):
                continue
            masked = any(_reads(item, spread) and is_masked(item) for item in linears(program.graph))
            unit = GROUP if masked else 1
            labels = torch.arange(width) // unit
            if unit > 1:
                spread = coupling.spread({ref: labels}, keep_outputs=True)
        except CouplingError as reason:
            if str(reason) not in reasons:
                context.declined(_scope(node), f"channels of the hidden state: {reason}")
            reasons.add(str(reason))
            continue
        name = next(str(item.target) for item in program.graph.nodes if _belongs(item, spread))
        found.append(SpreadSite(Site(CHANNELS, name, {ref: labels}, (unit,) * (width // unit)), spread))
    return found


def _added(program: Program, structure: Structure) -> Iterator[fx.Node]:
    """Values that lie in a residual stream: the states after layers, and the outputs of attentions and feed-forwards."""
    nodes = {node.name: node for node in program.graph.nodes}
    for states in hidden_states(program):
        yield from (state for state in states if state is not None)
    outputs = [item.o for item in structure.attentions] + [item.down for item in structure.feedforwards]
    for name in outputs:
        if name is not None:
            yield nodes[structure.linear(name).uses[0].node]


def _has_residual_sum(spread: Spread) -> bool:
    """Whether two values of the stream are added: else what was found is not added to anything."""
    refs = spread.labels.keys()
    for node, _ in refs:
        values = [item for item in node.all_input_nodes if rank(item) and not reads_no_input(item)]
        adds = traits_of(node).kind is Kind.SUM and len(values) == 2
        if adds and all((item, rank(item) - 1) in refs for item in values):
            return True
    return False


def _reads(linear: fx.Node, spread: Spread) -> bool:
    x = linear.args[0]
    assert isinstance(x, fx.Node)
    return (x, rank(x) - 1) in spread.labels


def _belongs(node: fx.Node, spread: Spread) -> bool:
    return node.op == "get_attr" and any((node, dim) in spread.labels for dim in range(rank(node)))


def _scope(node: fx.Node) -> str:
    return str(node.meta.get("scope") or node.name)
