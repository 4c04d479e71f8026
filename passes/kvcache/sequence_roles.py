"""Which values of a decoder belong to new tokens, which to all positions, and where the two meet.

Along the sequence a value is of one of these sides:

- tokens: made of the ids. With a cache it has S new positions.
- places: made of positions and masks alone (`arange`, `cumsum` of a mask, rotary angles, biases). It is computed for all
  P + S positions, and where it meets the tokens' side, the rows of the new ones are taken.
- keys: what attention mixes, behind the cache: P + S positions.
- scores: a query for each new position, a key for all.
- last: after the rows of the last position were taken, since only they are scored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.value_origins import CASTS, ROUNDINGS, Core, stem, walk
from bmgraph.errors import PassError
from bmgraph.ir.cache_spec import MEMORY_PREFIX
from bmgraph.ir.program import Program, output_node, placeholders

aten = torch.ops.aten


class Side(Enum):
    """The side of a value along the sequence; OTHER: it has no sequence."""

    OTHER = "other"
    PLACES = "places"
    TOKENS = "tokens"
    KEYS = "keys"
    SCORES = "scores"
    LAST = "last"


WIDENING = frozenset(
    {"expand", "unsqueeze", "reshape", "view", "clone", "contiguous", "repeat_interleave", "transpose", "permute",
     "flatten", "unflatten", "repeat"}
)  # fmt: skip
"""Calls by which few heads of keys and values become as many as there are of queries, and layout."""


@dataclass
class Sides:
    """What was found in a graph. `symbol` is the size of the tokens' sequence; `cached` are the values that the cache
    keeps, in order, each with its name; `masks` are inputs of all positions, `rows` further inputs of new ones."""

    tokens: fx.Node
    logits: fx.Node
    symbol: Any
    masks: tuple[fx.Node, ...] = ()
    rows: tuple[fx.Node, ...] = ()
    cores: list[Core] = field(default_factory=list)
    side: dict[fx.Node, Side] = field(default_factory=dict)
    cached: dict[fx.Node, str] = field(default_factory=dict)
    masked: set[fx.Node] = field(default_factory=set)
    """Places that depend on a mask: they know the padding of each row."""
    behind: set[tuple[fx.Node, fx.Node]] = field(default_factory=set)
    """(reader, value): where a kept value is read with all positions."""
    encoder: set[fx.Node] = field(default_factory=set)
    """What is made of inputs that have nothing to do with the tokens: it is computed once for a prompt."""
    memories: dict[fx.Node, str] = field(default_factory=dict)
    """What tokens and positions read of that, as late as it can be cut (keys and values of cross attention), by name."""

    def axes(self, node: fx.Node) -> list[int]:
        """The axes of a value that run over the sequence."""
        found = node.meta.get("val")
        if not isinstance(found, torch.Tensor):
            return []
        return [axis for axis, size in enumerate(found.shape) if expression(size) == self.symbol]

    def sized(self, node: fx.Node) -> bool:
        """Whether a value's size, or a size itself, has to do with the sequence."""
        found = node.meta.get("val")
        sizes = found.shape if isinstance(found, torch.Tensor) else (found,)
        return any(self.symbol in getattr(expression(size), "free_symbols", ()) for size in sizes)


def find_sides(program: Program) -> Sides:
    """The sides of a program in eval form; raises PassError where it is no decoder that a cache can serve."""
    graph = program.graph
    logits, vocabulary = _logits(program)
    symbol = expression(logits.meta["val"].shape[1])
    if not getattr(symbol, "is_Symbol", False):
        raise PassError("its sequence length is fixed: a cache needs a model that takes any")
    tokens = _tokens(graph, symbol, vocabulary)
    sides = Sides(tokens, logits, symbol)
    inputs = [node for node in placeholders(graph).values() if node is not tokens and sides.axes(node)]
    stream = _reached(graph, {tokens})
    sides.cores = [core for core in walk(graph).cores if core.k in stream]
    if not sides.cores:
        raise PassError("no attention among its tokens was found: only keys and values can be cached")
    masks = _masks(sides.cores)
    sides.masks = tuple(node for node in inputs if _reached(graph, {node}, stop=stream) & masks)
    sides.rows = tuple(node for node in inputs if node not in sides.masks)
    _check_inputs(sides)
    stream = _reached(graph, {tokens, *sides.rows})
    sides.masked = _reached(graph, set(sides.masks), stop=stream)
    for node in graph.nodes:
        if node in stream:
            sides.side[node] = Side.TOKENS
        elif node in sides.masks or (node.op == "call_function" and _has_places(sides, node)):
            sides.side[node] = Side.PLACES
        else:
            sides.side[node] = Side.OTHER
    for core in sides.cores:
        _place_cache(sides, core)
    _mark_last(sides)
    _find_memories(sides)
    return sides


def expression(size: Any) -> Any:
    """A size as a number or as an expression of symbols."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _logits(program: Program) -> tuple[fx.Node, int]:
    """The output f[B, S, V] that scores the next id, and V: it is as wide as a table is long in which an input is looked
    up (a table of distances may be as long as the model is wide)."""
    lookups = [
        node for node in program.graph.nodes if node.op == "call_function" and stem(node) == "embedding"
    ]
    of_inputs = [node for node in lookups if node.args[1].op == "placeholder"]
    tables = {int(node.args[0].meta["val"].shape[0]) for node in of_inputs or lookups}
    values: Any = output_node(program.graph).args[0]
    for spec, node in zip(program.outputs, values):
        if len(spec.shape) == 3 and spec.shape[2] in tables and spec.dtype.is_floating_point:
            return node, int(spec.shape[2])
    raise PassError(
        "no output scores the vocabulary: generation needs a model with a language head, whose logits are [batch, "
        "sequence, vocabulary]"
    )


def _tokens(graph: fx.Graph, symbol: Any, vocabulary: int) -> fx.Node:
    """The input i64[B, S] whose ids are looked up in the table of the vocabulary."""
    for node in graph.nodes:
        if node.op != "call_function" or stem(node) != "embedding":
            continue
        table, ids = node.args[:2]
        if ids.op == "placeholder" and table.meta["val"].shape[0] == vocabulary:
            sizes = ids.meta["val"].shape
            if len(sizes) == 2 and expression(sizes[1]) == symbol:
                return ids  # type: ignore[no-any-return]
    raise PassError(
        "no input of token ids [batch, sequence] was found: embeddings given from outside are not cached"
    )


def _reached(graph: fx.Graph, starts: set[fx.Node], stop: set[fx.Node] | None = None) -> set[fx.Node]:
    """What the values (not the sizes) of some nodes reach, with themselves, up to `stop`."""
    reached = set(starts)
    for node in graph.nodes:
        if node.op != "call_function" or (stop and node in stop) or is_size(node):
            continue
        if any(item in reached for item in node.all_input_nodes):
            reached.add(node)
    return reached


def is_size(node: fx.Node) -> bool:
    """Whether a node is a number rather than a tensor or several."""
    return not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


def _masks(cores: list[Core]) -> set[fx.Node]:
    """What is added to scores, or hides some, beside queries and keys."""
    found: set[fx.Node] = set()
    for core in cores:
        if core.scores is None:
            found |= {core.mask} if core.mask is not None else set()
            continue
        for node in _between(core):
            found |= set(node.all_input_nodes)
        found -= {core.scores}
    return found


def _between(core: Core) -> list[fx.Node]:
    """The calls from written-out scores (with themselves) to what mixes values (without it)."""
    assert core.scores is not None
    above = {core.node}
    inside: list[fx.Node] = []
    below = {core.scores}
    for node in core.node.graph.nodes:
        if node in below or any(item in below for item in node.all_input_nodes):
            below.add(node)
    stack = [core.node]
    while stack:
        for item in stack.pop().all_input_nodes:
            if item in below and item not in above:
                above.add(item)
                inside.append(item)
                stack.append(item)
    return inside


def _check_inputs(sides: Sides) -> None:
    if len(sides.masks) > 1 or any(node.meta["val"].dim() != 2 for node in sides.masks):
        names = ", ".join(str(node.target) for node in sides.masks)
        raise PassError(f"its masks are given as {names}: a cache takes one [batch, sequence]")
    for node in sides.rows:
        if "position" not in str(node.target) or node.meta["val"].dim() != 2:
            raise PassError(
                f"input {node.target!r} has a value for each token that generation does not know: capture without it"
            )


def _has_places(sides: Sides, node: fx.Node) -> bool:
    """Whether a call that no token reaches has to do with positions."""
    if is_size(node):
        return False
    return sides.sized(node) or any(
        sides.side.get(item) is Side.PLACES or (is_size(item) and sides.sized(item))
        for item in node.all_input_nodes
    )


def _place_cache(sides: Sides, core: Core) -> None:
    """Mark what is kept of one attention, and the sides behind it."""
    for operand, what in ((core.k, "key"), (core.v, "value")):
        chain = _climb(sides, operand)
        kept = _narrowest(sides, chain, core)
        if kept not in sides.cached:
            number = len([name for name in sides.cached.values() if name.startswith(what)])
            sides.cached[kept] = f"{what}_{number}"
        behind = chain[: chain.index(kept)]
        direct = core.node if core.scores is None or what == "value" else core.scores
        sides.behind.add((behind[-1] if behind else direct, kept))
        sides.side.update(dict.fromkeys(behind, Side.KEYS))
    if core.scores is not None:
        for node in _between(core):
            sides.side[node] = Side.SCORES


def _climb(sides: Sides, operand: fx.Node) -> list[fx.Node]:
    """An operand, and what it was widened from."""
    chain = [operand]
    while chain[-1].op == "call_function" and stem(chain[-1]) in WIDENING:
        source = chain[-1].args[0]
        assert isinstance(source, fx.Node)
        if sides.side[source] is not Side.TOKENS:
            break
        chain.append(source)
    return chain


def _narrowest(sides: Sides, chain: list[fx.Node], core: Core) -> fx.Node:
    """The value [B, heads, S, size] with the fewest heads, the nearest to attention where several have them."""
    batch = expression(sides.tokens.meta["val"].shape[0])
    fit = []
    for node in chain:
        shape = [expression(size) for size in node.meta["val"].shape]
        known = len(shape) == 4 and isinstance(shape[1], int) and isinstance(shape[3], int)
        if known and shape[0] == batch and sides.axes(node) == [2]:
            fit.append((shape[1] * shape[3], node))
    if not fit:
        where = core.node.meta.get("scope") or core.node.name
        raise PassError(f"the keys or values of {where} are not [batch, heads, sequence, size]")
    return min(fit, key=lambda item: item[0])[1]


def _find_memories(sides: Sides) -> None:
    """Tell the encoder from the decoder: what only inputs of the encoder reach, and where it is read from outside."""
    graph = sides.logits.graph
    inputs = {
        node
        for node in placeholders(graph).values()
        if sides.side[node] is Side.OTHER and node.meta["val"].dim() > 1
    }
    sides.encoder = {node for node in _reached(graph, inputs) if sides.side[node] is Side.OTHER}
    for node in graph.nodes:
        if node in sides.encoder and any(_reads_memory(sides, user) for user in node.users):
            sides.memories[node] = f"{MEMORY_PREFIX}{len(sides.memories)}"


def _reads_memory(sides: Sides, user: fx.Node) -> bool:
    return user not in sides.encoder and user.op == "call_function" and not is_size(user)


def _mark_last(sides: Sides) -> None:
    """Mark what only scores positions: from the last linear on, one position is enough."""
    open_above: set[fx.Node] = set()
    for node in reversed(sides.logits.graph.nodes):
        if node is not sides.logits and not (node.users and open_above.issuperset(node.users)):
            continue
        if sides.side.get(node) is not Side.TOKENS or not _by_position(sides, node):
            continue
        sides.side[node] = Side.LAST
        if node.target is not aten.linear.default:
            open_above.add(node)


def _by_position(sides: Sides, node: fx.Node) -> bool:
    """Whether a call computes each position [B, S, ...] from the same position of what it reads."""
    target = node.target
    alike = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    if not (alike or target is aten.linear.default or stem(node) in ROUNDINGS | CASTS):
        return False
    if sides.axes(node) != [1] or node.meta["val"].dim() != 3:
        return False
    return all(
        sides.side[item] is Side.OTHER or (sides.side[item] is Side.TOKENS and sides.axes(item) == [1])
        for item in node.all_input_nodes
    )
