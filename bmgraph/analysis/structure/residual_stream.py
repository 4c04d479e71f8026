"""What flows from layer to layer: the one value that all of a layer's work reaches the outputs by."""

from __future__ import annotations

import networkx as nx
from torch import fx
from torch.fx.node import Argument

from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.sites import Layer, Structure
from bmgraph.analysis.structure.value_origins import DROPOUTS, SUMS, stem
from bmgraph.ir.eval_form import in_eval
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import value


def hidden_states(program: Program) -> tuple[tuple[fx.Node | None, ...], ...]:
    """For each stack, the hidden state behind each of its layers; None where a layer has none of its own.

    It is the nearest node of the main graph that every path from each of the layer's sites to the outputs goes through
    (their nearest common post-dominator): the sum or norm that closes the layer, whatever it is made of. Where the
    parts of a layer stand side by side, what entered it is added to their sum; where its tokens are laid end to end,
    they are rows of a batch again behind it.
    """
    structure = find(program)
    uses = _uses(program, structure)
    norms = {norm.name for norm in structure.norms}
    after = _post_dominators(program.graph)
    return tuple(
        tuple(_behind(layer, uses, norms, after) for layer in stack.layers) for stack in structure.stacks
    )


def _uses(program: Program, structure: Structure) -> dict[str, list[fx.Node]]:
    """The nodes of the main graph that use each site."""
    nodes = {node.name: node for node in program.graph.nodes}
    uses = {linear.name: linear.uses for linear in structure.linears}
    uses |= {norm.name: norm.uses for norm in structure.norms}
    uses |= {group.up: group.uses for group in structure.experts}
    return {name: [nodes[use.node] for use in found if use.node in nodes] for name, found in uses.items()}


def _post_dominators(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The nearest node that every path from a node to what is returned goes through."""
    backward = nx.DiGraph()
    backward.add_node(output_node(graph))
    for node in graph.nodes:
        backward.add_edges_from((user, node) for user in node.users)
    found: dict[fx.Node, fx.Node] = nx.immediate_dominators(backward, output_node(graph))
    return found


def _behind(
    layer: Layer, uses: dict[str, list[fx.Node]], norms: set[str], after: dict[fx.Node, fx.Node]
) -> fx.Node | None:
    nodes = [node for site in layer.sites for node in uses.get(site, [])]
    if layer.times > 1 or not nodes:
        return None
    chains = [_chain(node, after) for node in nodes]
    shared = set(chains[0]).intersection(*chains[1:])
    nearest = next((node for node in chains[0] if node in shared), None)
    if nearest is None or nearest.op == "output":
        return None
    normed = {node.args[0] for site in layer.sites if site in norms for node in uses.get(site, [])}
    return in_eval(_completed(nearest, normed))


def _completed(state: fx.Node, entered: set[Argument]) -> fx.Node:
    """The sum of a layer's parts with what entered the layer, and its tokens in rows again."""
    while len(state.users) == 1:
        (user,) = state.users
        adds = stem(user) in SUMS and bool(entered.intersection(user.args) - {state})
        unfolds = stem(user) == "reshape" and value(state).dim() == 2 < value(user).dim()
        if not (adds or unfolds or stem(user) in DROPOUTS):
            break
        state = user
    return state


def _chain(node: fx.Node, after: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """A node and all that its paths go through, nearest first."""
    chain = [node]
    while (following := after.get(chain[-1])) is not None and following is not chain[-1]:
        chain.append(following)
    return chain
