"""Finds the hidden state after each layer: the single value through which a layer reaches the outputs."""

from __future__ import annotations

import networkx as nx
import torch
from torch import fx
from torch.fx.node import Argument

from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.sites import Layer, Structure
from bmgraph.ir.eval_form import in_eval
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import value
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import calls, traits_of


def hidden_states(program: Program) -> tuple[tuple[fx.Node | None, ...], ...]:
    """For each stack, the hidden state after each of its layers; None if a layer has none, or runs several times.

    It is the nearest common post-dominator of the layer's sites in the main graph: the nearest node on every path from
    each of them to the outputs, such as the sum or norm that ends the layer. Where attention and feed-forward run in
    parallel, it is the residual sum after both; where the layer flattens tokens into one axis, it is the value after they
    are unflattened again.
    """
    structure = find(program)
    uses = _uses(program, structure)
    norms = {norm.name for norm in structure.norms}
    post_dominators = _post_dominators(program.graph)
    return tuple(
        tuple(_state_after(layer, uses, norms, post_dominators) for layer in stack.layers)
        for stack in structure.stacks
    )


def _uses(program: Program, structure: Structure) -> dict[str, list[fx.Node]]:
    """Name of a site -> the nodes of the main graph that use it."""
    nodes = {node.name: node for node in program.graph.nodes}
    uses = {linear.name: linear.uses for linear in structure.linears}
    uses |= {norm.name: norm.uses for norm in structure.norms}
    uses |= {group.up: group.uses for group in structure.experts}
    return {name: [nodes[use.node] for use in found if use.node in nodes] for name, found in uses.items()}


def _post_dominators(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Node -> its immediate post-dominator: the nearest node on every path from it to the output."""
    backward = nx.DiGraph()
    backward.add_node(output_node(graph))
    for node in graph.nodes:
        backward.add_edges_from((user, node) for user in node.users)
    found: dict[fx.Node, fx.Node] = nx.immediate_dominators(backward, output_node(graph))
    return found


def _state_after(
    layer: Layer, uses: dict[str, list[fx.Node]], norms: set[str], post_dominators: dict[fx.Node, fx.Node]
) -> fx.Node | None:
    """The hidden state after one layer."""
    nodes = [node for site in layer.sites for node in uses.get(site, [])]
    if layer.times > 1 or not nodes:
        return None
    chains = [_chain(node, post_dominators) for node in nodes]
    shared = set(chains[0]).intersection(*chains[1:])
    nearest = next((node for node in chains[0] if node in shared), None)
    if nearest is None or nearest.op == "output":
        return None
    normed = {node.args[0] for site in layer.sites if site in norms for node in uses.get(site, [])}
    return in_eval(_completed(nearest, normed))


def _completed(state: fx.Node, entered: set[Argument]) -> fx.Node:
    """Follow a state through the residual sum, dropout and unflattening that complete the layer.

    `entered`: the inputs of the layer's norms; the residual sum adds one of them.
    """
    while len(state.users) == 1:
        (user,) = state.users
        adds = traits_of(user).kind is Kind.SUM and bool(entered.intersection(user.args) - {state})
        unfolds = calls(user, torch.ops.aten.reshape) and value(state).dim() == 2 < value(user).dim()
        if not (adds or unfolds or traits_of(user).kind is Kind.DROPOUT):
            break
        state = user
    return state


def _chain(node: fx.Node, post_dominators: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """A node and all its post-dominators, nearest first."""
    chain = [node]
    while (following := post_dominators.get(chain[-1])) is not None and following is not chain[-1]:
        chain.append(following)
    return chain
