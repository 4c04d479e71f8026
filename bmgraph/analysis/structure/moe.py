"""Finds experts, which are feed-forwards with weights chosen by ids, and the routers that compute the ids."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from bmgraph.analysis.structure.feedforward import shape_of
from bmgraph.analysis.structure.linears import linear_name, module_path, tensors_of, weight_name
from bmgraph.analysis.structure.sites import Experts, Use
from bmgraph.analysis.structure.value_origins import Flow, base
from bmgraph.ir.node_role import NodeRole, has_role
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of


def find_experts(program: Program, flows: dict[str, Flow]) -> list[Experts]:
    """All groups of experts: feed-forwards whose weights are chosen by ids from stacks [experts, ...]."""
    found: dict[str, Experts] = {}
    for graph, flow in flows.items():
        for down, (x, table) in flow.experts.items():
            shape = shape_of(flow.origins[x], set(flow.experts))
            if shape is None:
                continue
            up, gate, activation = shape
            name = weight_name(program, table)
            site = Experts(
                path=module_path(name),
                count=int(table.meta["val"].shape[0]),
                up=weight_name(program, flow.experts[up[0]][1]),
                down=name,
                gate=weight_name(program, flow.experts[gate[0]][1]) if gate else None,
                activation=activation,
                uses=(Use(graph, down.name),),
                split=has_role(down, NodeRole.NEURONS),
            )
            previous = found.get(name)
            found[name] = replace(site, uses=(*(previous.uses if previous else ()), *site.uses))
    return list(found.values())


def find_routers(program: Program, flows: dict[str, Flow]) -> list[str]:
    """Names of the weights of routers: linears between the input of experts and the ids that choose among them."""
    names: dict[str, None] = {}
    for flow in flows.values():
        inputs: dict[fx.Node, set[fx.Node]] = {}
        for product, (x, _) in flow.experts.items():
            if traits_of(product).kind is Kind.EXPERTS:
                inputs.setdefault(product.args[2], set()).add(base(x))  # type: ignore[arg-type]
        for ids, stops in inputs.items():
            between = _between(ids, stops)
            names.update((linear_name(program, node), None) for node in flow.linears if node in between)
    return list(names)


def experts_members(program: Program, flow: Flow) -> dict[str, str]:
    """Other parameter of experts (bias, codes, scale, mask, ...) -> the weight that it belongs to."""
    members: dict[str, str] = {}
    for node in flow.graph.nodes:
        if node in flow.experts:
            name = weight_name(program, flow.experts[node][1])
        elif has_role(node, NodeRole.NEURONS):
            name = str(node.meta["site"])
        else:
            continue
        parts = [item for item in node.all_input_nodes if flow.weights[item]]
        members.update((tensor, name) for part in parts for tensor in tensors_of(part) if tensor != name)
    return members


def _between(ids: fx.Node, stops: set[fx.Node]) -> set[fx.Node]:
    """The nodes that ids are computed from, back to the input of the experts."""
    seen: set[fx.Node] = set()
    stack = [ids]
    while stack:
        node = stack.pop()
        if node not in seen and base(node) not in stops:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen
