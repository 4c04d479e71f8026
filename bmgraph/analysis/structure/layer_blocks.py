"""Finds what each repeated layer makes of the hidden state: the value that enters it and the one that leaves it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import fx

from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.residual_stream import hidden_states
from bmgraph.analysis.structure.sites import Layer
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import value


@dataclass(frozen=True)
class Block:
    """A layer that turns one hidden state into the next: without it, `enters` takes the place of `leaves`.

    `number` counts the layers of all stacks, `stack` the stacks.
    """

    number: int
    stack: int
    path: str
    enters: fx.Node
    leaves: fx.Node


@dataclass(frozen=True)
class NoBlock:
    """A layer that cannot be left out, and why."""

    number: int
    stack: int
    path: str
    why: str


def layer_blocks(program: Program) -> list[Block | NoBlock]:
    """One for each layer of all stacks, in their order; see `hidden_states`.

    What enters the first layer of a stack is found by following that layer and the second side by side, from what leaves them.
    """
    found: list[Block | NoBlock] = []
    structure = find(program)
    weights = {site.name for site in structure.linears} | {site.up for site in structure.experts}
    for place, (stack, states) in enumerate(zip(structure.stacks, hidden_states(program))):
        enters = _before(states[0], states[1]) if len(states) > 1 else None
        for layer, leaves in zip(stack.layers, states):
            found.append(_block(program, weights, len(found), place, layer, enters, leaves))
            enters = leaves
    return found


def _block(
    program: Program,
    weights: set[str],
    number: int,
    stack: int,
    layer: Layer,
    enters: fx.Node | None,
    leaves: fx.Node | None,
) -> Block | NoBlock:
    """`weights`: the sites that are products; norms may be read elsewhere."""
    path = layer.path or layer.sites[0]
    if layer.times > 1:
        return NoBlock(
            number, stack, path, "its weights are used several times, so that it runs several times"
        )
    if enters is None or leaves is None or enters is leaves:
        return NoBlock(number, stack, path, "it has no separate hidden state")
    before, after = value(enters), value(leaves)
    if str(list(before.shape)) != str(list(after.shape)) or before.dtype != after.dtype:
        return NoBlock(number, stack, path, "what enters it and what leaves it differ in shape or type")
    runs = [use for run in layer.runs for use, site in zip(run, layer.sites) if site in weights]
    sites = {use.node for use in runs if use.graph == program.entry}
    read = next((node.name for node in _reached(program.graph, leaves, enters) if node.name in sites), None)
    if read is not None:
        return NoBlock(
            number, stack, path, f"what it computes ({read}) is read elsewhere, not only in the hidden state"
        )
    return Block(number, stack, path, enters, leaves)


def _before(first: fx.Node | None, second: fx.Node | None) -> fx.Node | None:
    """The value that has, in the layer that ends in `first`, the place that `first` has in the layer that ends in `second`."""
    if first is None or second is None:
        return None
    waiting, seen = deque([(second, first)]), {second}
    while waiting:
        later, earlier = waiting.popleft()
        if later is first:
            return earlier
        mine, theirs = later.all_input_nodes, earlier.all_input_nodes
        if later.target != earlier.target or len(mine) != len(theirs):
            continue
        for pair in zip(mine, theirs):
            if pair[0] not in seen:
                seen.add(pair[0])
                waiting.append(pair)
    return None


def _reached(graph: fx.Graph, leaves: fx.Node, enters: fx.Node) -> set[fx.Node]:
    """What the outputs are computed from if `enters` takes the place of `leaves`."""
    reached: set[fx.Node] = set()
    waiting = [output_node(graph)]
    while waiting:
        node = waiting.pop()
        if node in reached:
            continue
        reached.add(node)
        waiting += [enters if item is leaves else item for item in node.all_input_nodes]
    return reached
