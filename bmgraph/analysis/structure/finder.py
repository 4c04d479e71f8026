"""Entry point of structure analysis: finds all sites, roles and layers from dataflow, never from names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import fx

from bmgraph.analysis.structure.attention import find_attentions
from bmgraph.analysis.structure.feedforward import find_feedforwards
from bmgraph.analysis.structure.linears import find_linears, linear_name, tensors_of, weight_name
from bmgraph.analysis.structure.moe import experts_members, find_experts, find_routers
from bmgraph.analysis.structure.norms import find_embeddings, find_norms, norm_name
from bmgraph.analysis.structure.partial_evaluation import PartialEvaluator
from bmgraph.analysis.structure.repeated_layers import SiteUse, find_stacks
from bmgraph.analysis.structure.sites import Attention, Experts, FeedForward, Linear, Structure, Use
from bmgraph.analysis.structure.value_origins import Flow, walk
from bmgraph.ir.node_role import is_delta
from bmgraph.ir.program import Program


def find(program: Program) -> Structure:
    """Find all sites of a program, through whatever passes wrapped around weights and activations.

    Time is linear in the number of nodes.

    Example:
        >>> import torch, bmgraph as bg
        >>> layer = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> structure = bg.capture(layer, (torch.randn(3, 4),)).structure()
        >>> structure.role("2.weight"), structure.feedforwards[0].activation
        ('feedforward.down', 'relu')
    """
    flows = {name: walk(graph) for name, graph in program.graphs.items()}
    evaluator = PartialEvaluator(program)
    linears = find_linears(program, flows)
    attentions = find_attentions(program, evaluator, flows)
    feedforwards = find_feedforwards(program, evaluator, flows)
    experts = find_experts(program, flows)
    embeddings = find_embeddings(program, flows)
    norms = find_norms(program, flows)
    roles = _roles(attentions, feedforwards, experts)
    for embedding in embeddings:
        roles.setdefault(embedding.name, "embedding")
    for norm in norms:
        roles.setdefault(norm.name, "norm")
    for router in find_routers(program, flows):
        roles.setdefault(router, "router")
    linears = {name: replace(item, role=roles.get(name, "linear")) for name, item in linears.items()}
    members: dict[str, str] = {}
    for item in linears.values():
        roles.setdefault(item.name, item.role)
        members.update((tensor, item.name) for tensor in item.tensors if tensor not in roles)
    for flow in flows.values():
        members.update(_norm_members(program, flow, roles))
        members.update(experts_members(program, flow))
        members.update(_delta_members(flow))
    uses = [use for graph, flow in flows.items() for use in _site_uses(program, graph, flow, linears, roles)]
    return Structure(
        linears=tuple(linears.values()),
        attentions=tuple(attentions),
        feedforwards=tuple(feedforwards),
        experts=tuple(experts),
        embeddings=tuple(embeddings),
        norms=tuple(norms),
        stacks=tuple(find_stacks(uses)),
        roles=roles,
        members=members,
    )


def _roles(
    attentions: Iterable[Attention], feedforwards: Iterable[FeedForward], experts: Iterable[Experts]
) -> dict[str, str]:
    """Parameter -> role. A linear with several roles in one site gets a combined one, such as "attention.qkv"."""
    roles: dict[str, str] = {}
    for site in attentions:
        letters_of: dict[str, str] = {}
        for letter, part in (("q", site.q), ("k", site.k), ("v", site.v)):
            if part is not None:
                letters_of[part.linear] = letters_of.get(part.linear, "") + letter
        for name, letters in letters_of.items():
            roles.setdefault(name, f"attention.{letters}")
        if site.o is not None:
            roles.setdefault(site.o, "attention.o")
    for dense in feedforwards:
        fused = dense.gate is not None and dense.gate.linear == dense.up.linear
        roles.setdefault(dense.up.linear, "feedforward.gate_up" if fused else "feedforward.up")
        if dense.gate is not None:
            roles.setdefault(dense.gate.linear, "feedforward.gate")
        roles.setdefault(dense.down, "feedforward.down")
    for group in experts:
        kind = "feedforward" if group.split else "experts"
        roles.setdefault(group.up, f"{kind}.gate_up" if group.gate == group.up else f"{kind}.up")
        if group.gate is not None:
            roles.setdefault(group.gate, f"{kind}.gate")
        roles.setdefault(group.down, f"{kind}.down")
    return roles


def _norm_members(program: Program, flow: Flow, roles: Mapping[str, str]) -> dict[str, str]:
    """Other parameter of a norm, such as its bias -> the name of the norm."""
    members: dict[str, str] = {}
    for node in flow.norms:
        name = norm_name(program, node)
        for argument in node.all_input_nodes:
            if flow.weights[argument]:
                members.update((tensor, name) for tensor in tensors_of(argument) if tensor not in roles)
    return members


def _delta_members(flow: Flow) -> dict[str, str]:
    """Parameter of a delta -> the linear that it changes."""
    return {
        str(node.target): str(node.meta["site"])
        for node in flow.graph.nodes
        if node.op == "get_attr" and is_delta(node)
    }


def _site_uses(
    program: Program, graph: str, flow: Flow, linears: dict[str, Linear], roles: dict[str, str]
) -> list[SiteUse]:
    """The uses of linears, norms and experts in the order of one graph."""
    uses: dict[fx.Node, SiteUse] = {}
    for node in flow.linears:
        name = linear_name(program, node)
        item = linears[name]
        signature = ("linear", item.role, item.in_features, item.out_features, item.bias is None)
        uses[node] = SiteUse(Use(graph, node.name), name, signature, True)
    for node in flow.norms:
        kind = ("norm", str(node.target), str(node.meta["val"].shape[-1]))
        uses[node] = SiteUse(Use(graph, node.name), norm_name(program, node), kind, False)
    for node, (_, table) in flow.experts.items():
        name = weight_name(program, table)
        shape = ("experts", roles.get(name, ""), tuple(table.meta["val"].shape))
        uses[node] = SiteUse(Use(graph, node.name), name, shape, True)
    return [uses[node] for node in flow.graph.nodes if node in uses]
