"""Classifies the values of a decoder by how they depend on the sequence of tokens.

With S new tokens and P cached positions, a value has one of these roles:

- tokens: computed from the ids. With a cache it has the S new positions only.
- positions: computed from positions and masks alone (`arange`, `cumsum` of a mask, rotary angles, biases). It is
  computed for all P + S positions; where it meets tokens, the rows of the new positions are taken.
- keys: keys or values read from the cache: P + S positions.
- scores: attention scores, S queries by P + S keys.
- scored: computed for the positions to score alone, because only their logits are returned.
- other: does not depend on the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.value_origins import Core, walk
from bmgraph.analysis.token_values import between, ids_of, is_size, narrowest, widening_chain
from bmgraph.errors import PassError
from bmgraph.ir.input_kind import MASKS, InputKind
from bmgraph.ir.program import Program, output_node, placeholders
from bmgraph.ir.shape_inference import expression
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import is_elementwise, traits_of
from bmgraph.passes.kvcache.input_names import MEMORY_PREFIX

aten = torch.ops.aten


class SequenceRole(Enum):
    """How a value depends on the sequence; see the module."""

    OTHER = "other"
    POSITIONS = "positions"
    TOKENS = "tokens"
    KEYS = "keys"
    SCORES = "scores"
    SCORED = "scored"


@dataclass
class SequenceRoles:
    """The sequence role of every value of a graph, and where the cache attaches.

    `symbol` is the size of the sequence axis. `cores` are the attentions over tokens. `cached` maps each value that the
    cache keeps to its name, in order. `masks` are inputs over all positions, `position_inputs` further inputs with one value
    for each new token (position ids).
    """

    tokens: fx.Node
    logits: fx.Node
    symbol: Any
    masks: tuple[fx.Node, ...] = ()
    position_inputs: tuple[fx.Node, ...] = ()
    cores: list[Core] = field(default_factory=list)
    role: dict[fx.Node, SequenceRole] = field(default_factory=dict)
    cached: dict[fx.Node, str] = field(default_factory=dict)
    padding_aware: set[fx.Node] = field(default_factory=set)
    """Values with the role of positions that depend on a mask, and so on the padding of each row."""
    cache_reads: set[tuple[fx.Node, fx.Node]] = field(default_factory=set)
    """(reader, cached value): the reads that need all P + S positions."""
    independent: set[fx.Node] = field(default_factory=set)
    """Nodes that depend only on inputs unrelated to the tokens: computed once for each prompt."""
    memories: dict[fx.Node, str] = field(default_factory=dict)
    """Encoder outputs that the decoder reads (keys and values of cross-attention), by name. They are cut as late
    as possible.
    """

    def sequence_axes(self, node: fx.Node) -> list[int]:
        """The axes of a value that run over the sequence."""
        found = node.meta.get("val")
        if not isinstance(found, torch.Tensor):
            return []
        return [axis for axis, size in enumerate(found.shape) if expression(size) == self.symbol]

    def depends_on_length(self, node: fx.Node) -> bool:
        """Whether a value's shape, or a size itself, depends on the sequence length."""
        found = node.meta.get("val")
        sizes = found.shape if isinstance(found, torch.Tensor) else (found,)
        return any(self.symbol in getattr(expression(size), "free_symbols", ()) for size in sizes)


def find_sequence_roles(program: Program) -> SequenceRoles:
    """Classify a program in eval form.

    Raises PassError where the program is not a decoder that a cache can serve: no logits over a vocabulary, no token ids,
    a fixed sequence length, no attention over tokens, or inputs that generation cannot supply.
    """
    graph = program.graph
    logits, vocabulary = _logits(program)
    symbol = expression(logits.meta["val"].shape[1])
    if not getattr(symbol, "is_Symbol", False):
        raise PassError(
            "its sequence length is fixed: a KV cache needs a model captured with a dynamic sequence length"
        )
    tokens = _tokens(graph, symbol, vocabulary)
    roles = SequenceRoles(tokens, logits, symbol)
    inputs = [
        node for node in placeholders(graph).values() if node is not tokens and roles.sequence_axes(node)
    ]
    token_dependent = _reached(graph, {tokens})
    roles.cores = [core for core in walk(graph).cores if core.k in token_dependent]
    if not roles.cores:
        raise PassError(
            "found no attention over its tokens: a KV cache stores keys and values of attention only"
        )
    masks = _masks(roles.cores)
    roles.masks = tuple(node for node in inputs if _reached(graph, {node}, stop=token_dependent) & masks)
    roles.position_inputs = tuple(node for node in inputs if node not in roles.masks)
    _check_inputs(program, roles)
    token_dependent = _reached(graph, {tokens, *roles.position_inputs})
    roles.padding_aware = _reached(graph, set(roles.masks), stop=token_dependent)
    for node in graph.nodes:
        if node in token_dependent:
            roles.role[node] = SequenceRole.TOKENS
        elif node in roles.masks or (node.op == "call_function" and _depends_on_positions(roles, node)):
            roles.role[node] = SequenceRole.POSITIONS
        else:
            roles.role[node] = SequenceRole.OTHER
    for core in roles.cores:
        _mark_cached(roles, core)
    _mark_scored(roles)
    _find_memories(roles)
    return roles


def find_encoder_roles(program: Program) -> SequenceRoles | None:
    """The sequence roles of an encoder's values, as far as they tell of positions; None unless it takes ids [B, S] of a free size, with
    masks and position numbers alone beside them."""
    nodes, kinds = placeholders(program.graph), {spec.name: spec.kind for spec in program.inputs}
    ids = [
        node for name, node in nodes.items() if kinds[name] is InputKind.IDS and node.meta["val"].dim() == 2
    ]
    symbol = expression(ids[0].meta["val"].shape[1]) if len(ids) == 1 else None
    if not getattr(symbol, "is_Symbol", False):
        return None
    first: Any = output_node(program.graph).args[0]
    roles = SequenceRoles(ids[0], first[0], symbol)
    others = {
        node: kinds[name]
        for name, node in nodes.items()
        if node is not ids[0] and roles.depends_on_length(node)
    }
    if not MASKS.issuperset(set(others.values()) - {InputKind.POSITIONS}):
        return None
    roles.masks = tuple(node for node, kind in others.items() if kind in MASKS)
    roles.position_inputs = tuple(node for node in others if node not in roles.masks)
    token_dependent = _reached(program.graph, {ids[0], *roles.position_inputs})
    for node in program.graph.nodes:
        counted = (
            node not in token_dependent and node.op == "call_function" and _depends_on_positions(roles, node)
        )
        roles.role[node] = SequenceRole.POSITIONS if counted or node in roles.masks else SequenceRole.OTHER
        if node in token_dependent:
            roles.role[node] = SequenceRole.TOKENS
    return roles


def _logits(program: Program) -> tuple[fx.Node, int]:
    """The output f[B, S, V] that scores the next id, and V.

    V must be the length of an embedding table. Tables that an input indexes are preferred: a table of relative distances
    may by chance be as long as the model is wide.
    """
    lookups = [node for node in program.graph.nodes if traits_of(node).kind is Kind.EMBEDDING]
    input_lookups = [node for node in lookups if ids_of(node).op == "placeholder"]
    tables = {int(node.args[0].meta["val"].shape[0]) for node in input_lookups or lookups}
    values: Any = output_node(program.graph).args[0]
    for spec, node in zip(program.outputs, values):
        if len(spec.shape) == 3 and spec.shape[2] in tables and spec.dtype.is_floating_point:
            return node, int(spec.shape[2])
    raise PassError(
        "no output scores the vocabulary: generation needs a model with a language head, whose logits are [batch, "
        "sequence, vocabulary]"
    )


def _tokens(graph: fx.Graph, symbol: Any, vocabulary: int) -> fx.Node:
    """The input i64[B, S] whose ids index the embedding table of the vocabulary."""
    for node in graph.nodes:
        if traits_of(node).kind is not Kind.EMBEDDING:
            continue
        table, ids = node.args[0], ids_of(node)
        if ids.op == "placeholder" and table.meta["val"].shape[0] == vocabulary:
            sizes = ids.meta["val"].shape
            if len(sizes) == 2 and expression(sizes[1]) == symbol:
                return ids  # type: ignore[no-any-return]
    raise PassError(
        "found no input of token ids [batch, sequence]: a model that takes embeddings cannot have a KV cache"
    )


def _reached(graph: fx.Graph, starts: set[fx.Node], stop: set[fx.Node] | None = None) -> set[fx.Node]:
    """The nodes that depend on the values (not the sizes) of `starts`, with `starts`, not going past `stop`."""
    reached = set(starts)
    for node in graph.nodes:
        if node.op != "call_function" or (stop and node in stop) or is_size(node):
            continue
        if any(item in reached for item in node.all_input_nodes):
            reached.add(node)
    return reached


def _masks(cores: list[Core]) -> set[fx.Node]:
    """What is added to the scores or masks them, other than queries and keys."""
    found: set[fx.Node] = set()
    for core in cores:
        if core.scores is None:
            found |= {core.mask} if core.mask is not None else set()
            continue
        for node in between(core):
            found |= set(node.all_input_nodes)
        found -= {core.scores}
    return found


def _check_inputs(program: Program, roles: SequenceRoles) -> None:
    kinds = {spec.name: spec.kind for spec in program.inputs}
    if len(roles.masks) > 1 or any(node.meta["val"].dim() != 2 for node in roles.masks):
        names = ", ".join(str(node.target) for node in roles.masks)
        raise PassError(f"its masks are {names}: a KV cache supports one mask [batch, sequence]")
    for node in roles.masks:
        if kinds[str(node.target)] is InputKind.INVERSE_MASK:
            raise PassError(
                f"input {node.target!r} marks padding with ones: a KV cache needs a mask whose ones mark tokens; capture the "
                "model behind a forward that takes such a mask and negates it"
            )
    for node in roles.position_inputs:
        if kinds[str(node.target)] is not InputKind.POSITIONS or node.meta["val"].dim() != 2:
            raise PassError(
                f"input {node.target!r} has a value for each token that generation cannot supply: capture the model "
                "without it, or, if it holds the numbers of positions, with an example in which they count up"
            )
    if len(roles.position_inputs) > 1:
        names = ", ".join(str(node.target) for node in roles.position_inputs)
        raise PassError(f"{names} number its positions: a KV cache supports one such input [batch, sequence]")


def _depends_on_positions(roles: SequenceRoles, node: fx.Node) -> bool:
    """Whether a call that does not depend on tokens depends on positions."""
    if is_size(node):
        return False
    return roles.depends_on_length(node) or any(
        roles.role.get(item) is SequenceRole.POSITIONS or (is_size(item) and roles.depends_on_length(item))
        for item in node.all_input_nodes
    )


def _mark_cached(roles: SequenceRoles, core: Core) -> None:
    """Mark which keys and values of one attention are cached, and the roles of what reads them."""
    for operand, kind in ((core.k, "key"), (core.v, "value")):
        chain = widening_chain(operand, lambda node: roles.role[node] is SequenceRole.TOKENS)
        kept = narrowest(chain, core, expression(roles.tokens.meta["val"].shape[0]), roles.sequence_axes)
        if kept not in roles.cached:
            count = len([name for name in roles.cached.values() if name.startswith(kind)])
            roles.cached[kept] = f"{kind}_{count}"
        widened = chain[: chain.index(kept)]
        first_reader = core.node if core.scores is None or kind == "value" else core.scores
        roles.cache_reads.add((widened[-1] if widened else first_reader, kept))
        roles.role.update(dict.fromkeys(widened, SequenceRole.KEYS))
    if core.scores is not None:
        for node in between(core):
            roles.role[node] = SequenceRole.SCORES


def _find_memories(roles: SequenceRoles) -> None:
    """Find the nodes of the encoder, and those of them that the decoder reads."""
    graph = roles.logits.graph
    inputs = {
        node
        for node in placeholders(graph).values()
        if roles.role[node] is SequenceRole.OTHER and node.meta["val"].dim() > 1
    }
    roles.independent = {node for node in _reached(graph, inputs) if roles.role[node] is SequenceRole.OTHER}
    for node in graph.nodes:
        if node in roles.independent and any(_reads_memory(roles, user) for user in node.users):
            roles.memories[node] = f"{MEMORY_PREFIX}{len(roles.memories)}"


def _reads_memory(roles: SequenceRoles, user: fx.Node) -> bool:
    return user not in roles.independent and user.op == "call_function" and not is_size(user)


def _mark_scored(roles: SequenceRoles) -> None:
    """Mark the calls that only compute logits, from the last linear on: they need the positions to score."""
    only_logits: set[fx.Node] = set()
    for node in reversed(roles.logits.graph.nodes):
        if node is not roles.logits and not (node.users and only_logits.issuperset(node.users)):
            continue
        if roles.role.get(node) is not SequenceRole.TOKENS or not _is_per_position(roles, node):
            continue
        roles.role[node] = SequenceRole.SCORED
        if node.target is not aten.linear.default:
            only_logits.add(node)


def _is_per_position(roles: SequenceRoles, node: fx.Node) -> bool:
    """Whether a call computes each position [B, S, ...] from the same position of its inputs."""
    if not (is_elementwise(node) or traits_of(node).kind in (Kind.LINEAR, Kind.ROUNDING)):
        return False
    if roles.sequence_axes(node) != [1] or node.meta["val"].dim() != 3:
        return False
    return all(
        roles.role[item] is SequenceRole.OTHER
        or (roles.role[item] is SequenceRole.TOKENS and roles.sequence_axes(item) == [1])
        for item in node.all_input_nodes
    )
