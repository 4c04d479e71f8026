"""The graph of a decoder's step for one new position of each row, which appends to its KV cache in place.

The program's own graph takes any number of new positions: it gives the whole cache anew, and repeats the keys and values of shared heads
for all queries. For one position that copying is most of what a step moves.

Shapes: B rows, P cached positions, H query heads in groups of G that share one of H / G key heads, T positions read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.ir.cache_spec import CacheLayout
from bmgraph.ir.program import Program, copy_graph, output_node
from bmgraph.ir.shape_inference import dims

aten = torch.ops.aten

SIZE, CAT, RESHAPE = aten.sym_size.int, aten.cat.default, aten.reshape.default
ATTENTION = aten.scaled_dot_product_attention.default
KEY, VALUE, MASK, CAUSAL = 1, 2, 3, 5
"""Arguments of attention."""

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
    if layout is None or _appends(program.graph, layout) is None:
        return None
    graph = copy_graph(program.graph)
    _append_in_place(graph, layout, None)
    _group_queries(program, graph)
    masks = _masks_of(program, layout)
    if masks is None:
        return OneTokenStep(graph, None, ())
    fixed = copy_graph(program.graph)
    last = [node for node in fixed.nodes if node.op == "placeholder"][-1]
    with fixed.inserting_after(last):
        place = fixed.placeholder(PLACE)
    _append_in_place(fixed, layout, place)
    _group_queries(program, fixed)
    return OneTokenStep(graph, fixed, masks)


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
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
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
        if node.target is not ATTENTION or any(node.args[CAUSAL:]) or node.kwargs.get("is_causal"):
            continue
        key, value = _unrepeated(program, node.args[KEY]), _unrepeated(program, node.args[VALUE])
        query, mask = node.args[0], node.args[MASK] if len(node.args) > MASK else None
        if key is None or value is None or not isinstance(query, fx.Node):
            continue
        (rows, heads, _, width), groups = _shape(program, query), _shape(program, key)[1]
        if not isinstance(heads, int) or not isinstance(width, int) or groups != _shape(program, value)[1]:
            continue
        out = _shape(program, value)[3]
        mask_shape = None if mask is None else _shape(program, mask)
        if mask_shape is not None and len(mask_shape) == 4 and mask_shape[1] not in (1, heads):
            continue
        each = heads // groups
        with graph.inserting_before(node):
            count: Any = rows if isinstance(rows, int) else graph.call_function(SIZE, (query, 0))
            grouped = graph.call_function(RESHAPE, (query, [count, groups, each, width]))
            if mask_shape is not None and len(mask_shape) == 4 and mask_shape[1] == heads and heads > 1:
                size = [graph.call_function(SIZE, (mask, axis)) for axis in (0, 3)]
                mask = graph.call_function(RESHAPE, (mask, [size[0], groups, each, size[1]]))
            args = (grouped, key, value, *(() if mask is None else (mask,)))
            kwargs = {
                name: given for name, given in node.kwargs.items() if name not in ("enable_gqa", "attn_mask")
            }
            found = graph.call_function(ATTENTION, args, kwargs)
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


def _masks_of(program: Program, layout: CacheLayout) -> tuple[fx.Node, ...] | None:
    """The masks of the attentions that read the cache; None where it is read otherwise, or one has no mask."""
    appends = _appends(program.graph, layout)
    if appends is None or layout.mask is None:
        return None
    masks: list[fx.Node] = []
    for _, append in appends:
        for reader, source in _readers(append):
            if reader.op == "output":
                continue
            mask = reader.args[MASK] if len(reader.args) > MASK else reader.kwargs.get("attn_mask")
            read = reader.target is ATTENTION and source in reader.args[KEY : VALUE + 1]
            if not read or source is reader.args[0] or not isinstance(mask, fx.Node):
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
