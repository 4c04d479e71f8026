"""Which values of a graph are made of the tokens along one sequence, and which keys and values attention keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.value_origins import Core, base, walk
from bmgraph.errors import PassError
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.node_role import SOFT_TOKENS, has_role
from bmgraph.ir.program import Program, placeholders
from bmgraph.ir.shape_inference import expression
from bmgraph.ops.traits import calls, traits_of

aten = torch.ops.aten

SEQUENCE_AXIS = 2
"""The axis of positions in keys and values [B, heads, positions, size]."""


@dataclass(frozen=True)
class TokenValues:
    """The values along one sequence whose size is `symbol`.

    `source`: an input along it, and `axis` the axis. `inputs`: all of them, with their axes, and `positions` those of them that
    number positions. `values`: what is computed from the
    tokens' embeddings or features. Everything else along the sequence is of positions, masks and ids.
    """

    symbol: Any
    source: fx.Node
    axis: int
    inputs: dict[fx.Node, int]
    positions: frozenset[fx.Node]
    values: frozenset[fx.Node]

    def axes(self, node: fx.Node) -> list[int]:
        """The axes of a value that run over the sequence."""
        found = node.meta.get("val")
        if not isinstance(found, torch.Tensor):
            return []
        return [axis for axis, size in enumerate(found.shape) if expression(size) == self.symbol]


def token_values(program: Program, symbol: Any) -> TokenValues:
    """The values along the sequence of size `symbol`; raises PassError where no input has embeddings or features along it."""
    graph = program.graph
    inputs: dict[fx.Node, int] = {}
    for node in placeholders(graph).values():
        axes = [axis for axis, size in enumerate(node.meta["val"].shape) if expression(size) == symbol]
        if axes:
            inputs[node] = axes[0]
    specs = {spec.name: spec for spec in program.inputs}
    kinds = {node: specs[str(node.target)].kind for node in inputs}
    starts = _lookups(graph, symbol, inputs, kinds)
    starts |= {node for node in inputs if kinds[node] is InputKind.FEATURES}
    if not starts:
        raise PassError("no tokens along the sequence are looked up in an embedding, or given as features")
    ids = [node for node in inputs if kinds[node] in (InputKind.IDS, InputKind.FEATURES)]
    source = next(iter(ids or inputs))
    positions = frozenset(node for node in inputs if kinds[node] is InputKind.POSITIONS)
    return TokenValues(symbol, source, inputs[source], inputs, positions, frozenset(reached(graph, starts)))


def _lookups(
    graph: fx.Graph,
    symbol: Any,
    inputs: Collection[fx.Node],
    kinds: dict[fx.Node, InputKind | None],
) -> set[fx.Node]:
    """The lookups of tokens: of an input of ids as it is; where there is none, in the largest table that an input is looked up
    in (a decoder whose ids are shifted labels)."""
    from_inputs = reached(graph, set(inputs))
    computed: dict[fx.Node, int] = {}
    direct: set[fx.Node] = set()
    for node in walk(graph).embeddings:
        indices = looked_up(node)
        if not isinstance(indices, fx.Node) or indices not in from_inputs:
            continue
        if not any(expression(size) == symbol for size in indices.meta["val"].shape):
            continue
        if kinds.get(ids_of(node)) is InputKind.IDS:
            direct.add(node)
        computed[node] = int(node.args[0].meta["val"].shape[0])  # type: ignore[union-attr]
    if direct or not computed:
        return direct
    most = max(computed.values())
    return {node for node, rows in computed.items() if rows == most}


def looked_up(lookup: fx.Node) -> Any:
    """The indices of a lookup (`aten.index` takes them in a list)."""
    indices = lookup.args[1]
    return indices[0] if isinstance(indices, (list, tuple)) else indices


def ids_of(lookup: fx.Node) -> Any:
    """The value whose ids a lookup of words reads, whether or not some of them are soft tokens."""
    found = base(looked_up(lookup))
    while isinstance(found, fx.Node) and has_role(found, SOFT_TOKENS) and calls(found, aten.clamp):
        found = base(found.args[0])
    return found


def reached(graph: fx.Graph, starts: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on the values (not the sizes) of `starts`, with `starts`."""
    found = set(starts)
    for node in graph.nodes:
        if (
            node.op == "call_function"
            and not is_size(node)
            and any(item in found for item in node.all_input_nodes)
        ):
            found.add(node)
    return found


def is_size(node: fx.Node) -> bool:
    """Whether a node is a number rather than a tensor or a sequence of tensors."""
    return not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


def widening_chain(operand: fx.Node, of_tokens: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """An operand of attention and the values that it was widened from, nearest first."""
    chain = [operand]
    while traits_of(chain[-1]).keeps_values or calls(chain[-1], aten.repeat_interleave):  # key-value heads
        source = chain[-1].args[0]
        assert isinstance(source, fx.Node)
        if not of_tokens(source):
            break
        chain.append(source)
    return chain


def narrowest(
    chain: list[fx.Node], core: Core, rows: Any, sequence_axes: Callable[[fx.Node], list[int]]
) -> fx.Node:
    """The value [B, heads, S, size] with the fewest elements; of several, the one nearest to the attention.

    `rows` is B. Raises PassError where there is none.
    """
    candidates = []
    for node in chain:
        shape = [expression(size) for size in node.meta["val"].shape]
        is_four_dims = len(shape) == 4 and isinstance(shape[1], int) and isinstance(shape[3], int)
        if is_four_dims and shape[0] == rows and sequence_axes(node) == [SEQUENCE_AXIS]:
            candidates.append((shape[1] * shape[3], node))
    if not candidates:
        where = core.node.meta.get("scope") or core.node.name
        raise PassError(f"the keys or values of {where} are not [batch, heads, sequence, size]")
    return min(candidates, key=lambda item: item[0])[1]


def between(core: Core) -> list[fx.Node]:
    """The calls from written-out scores (included) to the product with the values (excluded)."""
    assert core.scores is not None
    visited = {core.node}
    inside: list[fx.Node] = []
    descendants = {core.scores}
    for node in core.node.graph.nodes:  # in topological order
        if node in descendants or any(item in descendants for item in node.all_input_nodes):
            descendants.add(node)
    stack = [core.node]
    while stack:
        for item in stack.pop().all_input_nodes:
            if item in descendants and item not in visited:
                visited.add(item)
                inside.append(item)
                stack.append(item)
    return inside
