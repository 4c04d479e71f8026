"""The graph of a decoder's step for one new position of each row, which appends to its KV cache in place.

The program's own graph takes any number of new positions: it gives the whole cache anew, and repeats the keys and values of shared heads
for all queries. For one position that copying is most of what a step moves.

Shapes: B rows, P cached positions, H query heads in groups of G that share one of H / G key heads, T positions read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.ir.cache_spec import CacheLayout
from bmgraph.ir.program import Program, copy_graph, output_node
from bmgraph.ir.shape_inference import dims
from bmgraph.ops.traits import argument

aten = torch.ops.aten

SIZE, CAT, RESHAPE = aten.sym_size.int, aten.cat.default, aten.reshape.default
ATTENTION = aten.scaled_dot_product_attention.default
PLACE = "cache_place"
"""The input i64[1] that says where the new position goes, in front of the last one, of a step whose cache has a fixed size."""


@dataclass(frozen=True)
class OneTokenStep:
    """`graph` takes the program's inputs, the parts of the cache with room for the new position, the last one, and gives them written.

    `fixed` takes `cache_place` behind them, and parts of the cache of any size: the new position is read as the last one, and also written
    at that place, where later steps read it; the mask says which others there are. It is right where all `masks`, nodes of the program's
    graph, hide what the mask hides and nothing else. None where attention reads the cache in another way than by its mask.
    """

    graph: fx.Graph
    fixed: fx.Graph | None
    masks: tuple[fx.Node, ...]


def one_token_step(program: Program) -> OneTokenStep | None:
    """The step of a program in eval form with a KV cache; None where a part of the cache is not appended to by one concatenation."""
    layout = program.cache
    appends = None if layout is None else _appends(program.graph, layout)
    if layout is None or appends is None:
        return None
    masks = None if layout.mask is None else _masks_of(append for _, append in appends)
    graph = _step(program, layout, fixed=False)
    if masks is None:
        return OneTokenStep(graph, None, ())
    return OneTokenStep(graph, _step(program, layout, fixed=True), masks)


def _step(program: Program, layout: CacheLayout, fixed: bool) -> fx.Graph:
    graph = copy_graph(program.graph)
    place = None
    if fixed:
        with graph.inserting_after(_last_input(graph)):
            place = graph.placeholder(PLACE)
    _append_in_place(graph, layout, place)
    _group_queries(program, graph)
    return graph


def _last_input(graph: fx.Graph) -> fx.Node:
    last: fx.Node = [node for node in graph.nodes if node.op == "placeholder"][-1]
    return last


def written_last(held: torch.Tensor, new: torch.Tensor, axis: int) -> torch.Tensor:
    """`held` with the new positions written over its last ones."""
    count = new.shape[axis]
    held.narrow(axis, held.shape[axis] - count, count).copy_(new)
    return held


def written_at(held: torch.Tensor, new: torch.Tensor, axis: int, place: torch.Tensor) -> torch.Tensor:
    """`held` with the new position written at `place`, and where it is read, the last one."""
    return written_last(held.index_copy_(axis, place, new), new, axis)


def _appends(graph: fx.Graph, layout: CacheLayout) -> list[tuple[fx.Node, fx.Node]] | None:
    """(past, the concatenation that appends to it) of each part of the cache; None where one is read or given otherwise."""
    inputs = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    returned: Any = output_node(graph).args[0]
    found: list[tuple[fx.Node, fx.Node]] = []
    for slot in layout.slots:
        past = inputs[slot.past]
        appends = [user for user in past.users if user.target is not SIZE]
        if len(appends) != 1:
            return None
        (append,) = appends
        if append.target is not CAT or append not in returned:
            return None
        joined: Any = append.args[0]
        axis = append.args[1] if len(append.args) > 1 else 0
        if (
            len(joined) != 2
            or joined[0] is not past
            or axis not in (slot.axis, slot.axis - past.meta["val"].dim())
        ):
            return None
        found.append((past, append))
    return found


def _append_in_place(graph: fx.Graph, layout: CacheLayout, place: fx.Node | None) -> None:
    appends = _appends(graph, layout)
    assert appends is not None
    tokens = next(node for node in graph.nodes if node.op == "placeholder" and node.target == layout.tokens)
    with graph.inserting_after(_last_input(graph)):
        new = graph.call_function(SIZE, (tokens, 1))
    for slot, (past, append) in zip(layout.slots, appends):
        sizes = [user for user in past.users if user.target is SIZE and user.args[1] == slot.axis]
        if sizes:
            with graph.inserting_after(new):
                held = graph.call_function(SIZE, (past, slot.axis))
            with graph.inserting_after(held):
                before = graph.call_function(operator.sub, (held, new))
            for size in sizes:
                size.replace_all_uses_with(before)
                graph.erase_node(size)
        joined: Any = append.args[0]
        with graph.inserting_before(append):
            more = () if place is None else (place,)
            written = graph.call_function(
                written_last if place is None else written_at, (past, joined[1], slot.axis, *more)
            )
        written.meta = dict(append.meta)
        append.replace_all_uses_with(written)
        graph.erase_node(append)


def _group_queries(program: Program, graph: fx.Graph) -> None:
    """Let attention of one position take the queries that share a head as rows of that head: keys and values need no copies."""
    for node in list(graph.nodes):
        if node.target is not ATTENTION or argument(node, "is_causal") or argument(node, "enable_gqa"):
            continue
        key, value = (_unrepeated(program, argument(node, name)) for name in ("key", "value"))
        query, mask = argument(node, "query"), argument(node, "attn_mask")
        if key is None or value is None:
            continue
        (rows, heads, _, width), groups = _shape(program, query), _shape(program, key)[1]
        if not isinstance(heads, int) or not isinstance(width, int) or groups != _shape(program, value)[1]:
            continue
        out = _shape(program, value)[3]
        by_head = () if mask is None else _shape(program, mask)[-4:][-3:-2]
        whole_mask = mask is not None and len(_shape(program, mask)) == 4
        if by_head not in ((), (1,), (heads,)) or (by_head == (heads,) and not whole_mask):
            continue
        each = heads // groups
        with graph.inserting_before(node):
            count: Any = rows if isinstance(rows, int) else graph.call_function(SIZE, (query, 0))
            grouped = graph.call_function(RESHAPE, (query, [count, groups, each, width]))
            if by_head == (heads,):
                size = [graph.call_function(SIZE, (mask, axis)) for axis in (0, 3)]
                mask = graph.call_function(RESHAPE, (mask, [size[0], groups, each, size[1]]))
            scale = {"scale": argument(node, "scale")}
            found = graph.call_function(ATTENTION, (grouped, key, value, mask), scale)
            whole = graph.call_function(RESHAPE, (found, [count, heads, 1, out]))
        whole.meta = dict(node.meta)
        node.replace_all_uses_with(whole)
    graph.eliminate_dead_code()


def _unrepeated(program: Program, value: Any) -> fx.Node | None:
    """x [B, H / G, T, d] of its repetition for G queries each, reshape(expand(unsqueeze(x, 2))) [B, H, T, d]; of x [B, 1, T, d] that is
    expanded; None for anything else."""
    if not isinstance(value, fx.Node) or len(_shape(program, value)) != 4:
        return None
    heads = _shape(program, value)[1]
    source = value.args[0] if value.args else None
    if value.target is aten.expand.default and isinstance(source, fx.Node):
        return (
            source if len(_shape(program, source)) == 4 and _shape(program, source)[1] == 1 != heads else None
        )
    if (
        value.target is not RESHAPE
        or not isinstance(source, fx.Node)
        or source.target is not aten.expand.default
    ):
        return None
    apart = source.args[0]
    if (
        not isinstance(apart, fx.Node)
        or apart.target is not aten.unsqueeze.default
        or apart.args[1] not in (2, -3)
    ):
        return None
    x: Any = apart.args[0]
    shape, repeated = _shape(program, x), _shape(program, source)
    same = len(shape) == 4 and (repeated[0], repeated[1], *repeated[3:]) == shape
    whole = same and all(isinstance(size, int) for size in (heads, *repeated[1:3]))
    return x if whole and repeated[1] * repeated[2] == heads else None


def _shape(program: Program, node: Any) -> tuple[Any, ...]:
    return dims(program, node.meta["val"])


def _masks_of(appends: Iterable[fx.Node]) -> tuple[fx.Node, ...] | None:
    """The masks of the attentions that read the parts of a cache; None where one is read otherwise, or by attention without a mask."""
    masks: list[fx.Node] = []
    for append in appends:
        for reader, source in _readers(append):
            if reader.op == "output":
                continue
            if reader.target is not ATTENTION or argument(reader, "query") is source:
                return None
            mask = argument(reader, "attn_mask")
            if not isinstance(mask, fx.Node) or mask is source:
                return None
            masks.append(mask)
    return tuple(dict.fromkeys(masks))


def _readers(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(call, what it reads) of what reads a part of the cache, also behind its repetition for shared heads."""
    views: Sequence[Callable[..., Any]] = (aten.unsqueeze.default, aten.expand.default, RESHAPE)
    for user in node.users:
        if user.target is SIZE:
            continue
        if user.target in views:
            yield from _readers(user)
        else:
            yield user, node
