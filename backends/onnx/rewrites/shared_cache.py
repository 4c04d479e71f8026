"""Let attention append to the KV cache in place: GroupQueryAttention instead of Concat and Attention.

Concat copies the whole cache for every new token. GroupQueryAttention takes a cache that is longer than the positions in it and writes
the new ones where they belong, if past and present are the same memory; where they are not, it copies as Concat does.

Where padding alone is hidden, rows may also begin at the first position and end where they end: a new input says where.

The kernel has two forms. One goes through the scores in tiles, and calls itself for each row where rows end apart. The other holds the
scores of all new positions at once, and is faster for one new position of each row, above all where its scale is 1 (it then takes the
product of a matrix and a vector). A sink chooses the second; the scale goes into the weights that make the queries.

Shapes: B rows, S new positions, T all positions, C those that the cache has room for, H heads of queries, K of keys, d size of a head.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.cache_attention import CacheRead, Heads, Read, cache_read
from bmgraph.backends.onnx.rewrites.fold_factor import fold_factor
from bmgraph.backends.onnx.rewrites.graph_utils import (
    DOMAIN,
    PROVENANCE,
    add_constant,
    only_use,
    producer,
)

SINK = -1e30
"""The score of a sink that takes nothing from any key: its weight is 0 beside any score, and a query that sees no key gets 0."""

ENDS = "row_ends"
"""The input i32[B] that says where the new position of each row stands; i32[1] of -1 for the last of all (`CacheSpec.ends`)."""


def append_in_place(model: ir.Model) -> int:
    """Replace every marked Attention over `Concat(past, new)`, if the kernel has the form of all that read the cache; returns the
    count."""
    graph = model.graph
    reads = [read for node in graph if (read := cache_read(node)) is not None]
    if not reads or {slot.past for read in reads for slot in read.slots} != _appended(graph):
        return 0
    ends = None
    if all(read.kind is Read.PADDING for read in reads):  # other masks count positions from the last one
        ends = ir.Value(name=ENDS, shape=ir.Shape([ENDS]), type=ir.TensorType(ir.DataType.INT32))
        graph.inputs.append(ends)
    shared = _Shared(graph, ends)
    for read in reads:
        _replace(graph, read, shared)
    graph.opset_imports.setdefault(DOMAIN, 1)
    model.opset_imports.setdefault(DOMAIN, 1)
    return len(reads)


def _appended(graph: ir.Graph) -> set[ir.Value]:
    """The inputs that a Concat along positions appends to for an output: all parts of the cache."""
    return {
        value
        for value in graph.inputs
        if any(use.node.op_type == "Concat" and use.node.outputs[0].is_graph_output() for use in value.uses())
    }


def in_place_slots(graph: ir.Graph) -> tuple[frozenset[tuple[str, str]], bool]:
    """(past, present) of every part of a cache that is written in place where both are the same memory, and whether attention rotates
    queries and keys: it then turns the new positions of all rows by the angles of the first, unless each row has one new position."""
    found, rotates = [], False
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            rotates = rotates or bool(node.attributes.get_int("do_rotary", 0))
            for past, present in zip(node.inputs[3:5], node.outputs[1:3]):
                if (
                    past is not None
                    and past.is_graph_input()
                    and present.is_graph_output()
                    and len(past.uses()) == 1
                ):
                    found.append((str(past.name), str(present.name)))
    return frozenset(found), rotates


def ends_input(graph: ir.Graph) -> str | None:
    """The name of the input that says where rows end, if attention reads one."""
    return next((str(value.name) for value in graph.inputs if value.name == ENDS), None)


class _Shared:
    """Values that all attentions over one mask, or with the same angles, read; each is made once, before the first of them."""

    def __init__(self, graph: ir.Graph, ends: ir.Value | None) -> None:
        self._graph, self._ends = graph, ends
        self._made: dict[tuple[object, ...], tuple[ir.Value, ...]] = {}

    def lengths(self, read: CacheRead, query: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The last position of each row i32[B], and the number of positions T i32[1]; `query` is f[B, S, H * d]."""
        key = ("lengths", read.carrier)
        if key not in self._made:
            emit = _Emitter(self._graph, read.node, str(read.carrier.name))
            total = emit("Cast", [self._total(emit, read)], to=int(ir.DataType.INT32))
            last = emit("Sub", [total, emit.constant("one", np.array([1], np.int32))])
            if self._ends is not None:
                behind = emit("Less", [self._ends, emit.constant("none", np.array([0], np.int32))])
                last = emit("Where", [behind, last, self._ends])
            self._made[key] = emit("Expand", [last, emit("Shape", [query], start=0, end=1)]), total
        last, total = self._made[key]
        return last, total

    def bias(self, read: CacheRead, query: ir.Value) -> ir.Value | None:
        """What is added to scores, f[B or 1, H or 1, S, T]; None for nothing. `query` is f[B, S, H * d]."""
        if read.kind is Read.NOTHING:
            return None
        source = read.carrier if read.kind is Read.PADDING else read.mask
        key = ("bias", source)
        if key not in self._made:
            emit = _Emitter(self._graph, read.node, f"{source.name}_bias")
            self._made[key] = (
                _padding(emit, source, query) if read.kind is Read.PADDING else _bias(emit, source),
            )
        return self._made[key][0]

    def _total(self, emit: _Emitter, read: CacheRead) -> ir.Value:
        return emit("Shape", [read.carrier], start=1, end=2)

    def sink(self, read: CacheRead) -> ir.Value:
        """A sink f[H] that takes nothing."""
        key = ("sink", read.query.count)
        if key not in self._made:
            emit = _Emitter(self._graph, read.node, f"sink_{read.query.count}")
            self._made[key] = (emit.constant("heads", np.full(read.query.count, SINK, np.float32)),)
        return self._made[key][0]

    def angles(self, read: CacheRead) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Tables of cos and sin with a row for each new position of each row, and the numbers of these rows i64[B, S].

        The kernel wants tables of T rows or more, of which those behind the new positions are never read.
        """
        cos, sin = read.query.cos, read.query.sin
        assert cos is not None
        assert sin is not None
        key = ("angles", cos, sin, read.carrier)
        if key not in self._made:
            emit = _Emitter(self._graph, read.node, f"{cos.name}_rows")
            zeros, zero = (
                emit.constant("zeros", np.zeros(2, np.int64)),
                emit.constant("zero", np.zeros(1, np.int64)),
            )
            pads = emit("Concat", [zeros, self._total(emit, read), zero], axis=0)
            flat = emit.constant("flat", np.array([-1, read.query.size // 2], np.int64))
            tables = [emit("Pad", [emit("Reshape", [table, flat]), pads]) for table in (cos, sin)]
            shape = emit("Shape", [cos], start=0, end=2)
            first, step = (
                emit.constant(name, np.array(value, np.int64)) for name, value in (("first", 0), ("step", 1))
            )
            count = emit("ReduceProd", [shape], keepdims=0)
            numbers = emit("Reshape", [emit("Range", [first, count, step]), shape])
            self._made[key] = (*tables, numbers)
        cos, sin, numbers = self._made[key]
        return cos, sin, numbers


class _Emitter:
    """Adds nodes before another one, with its provenance; `about` is a part of the names of their values."""

    def __init__(self, graph: ir.Graph, before: ir.Node, about: str) -> None:
        self._graph, self._before, self._about = graph, before, about

    def __call__(self, operator: str, inputs: list[ir.Value], **attributes: int | list[int]) -> ir.Value:
        node = ir.node(operator, inputs, attributes or None)
        props = self._before.metadata_props
        node.metadata_props.update({key: props[key] for key in PROVENANCE if key in props})
        self._graph.insert_before(self._before, node)
        return node.outputs[0]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A constant of the graph."""
        return add_constant(self._graph, f"{self._about}_{name}", array)


def _bias(emit: _Emitter, mask: ir.Value) -> ir.Value:
    """A mask [..., S, T] as what is added to scores, of four axes."""
    missing = 4 - len(mask.shape)  # type: ignore[arg-type]
    if missing:
        mask_type = mask.type
        mask = emit("Unsqueeze", [mask, emit.constant("axes", np.arange(missing, dtype=np.int64))])
        mask.type = mask_type
    return mask if mask.dtype == ir.DataType.FLOAT else emit("Where", [mask, *_seen_and_hidden(emit)])


def _padding(emit: _Emitter, mask: ir.Value, query: ir.Value) -> ir.Value:
    """A mask i[B, T] of keys as what is added to scores f[B, 1, S, T]."""
    keys = emit("Where", [emit("Cast", [mask], to=int(ir.DataType.BOOL)), *_seen_and_hidden(emit)])
    rows = emit("Unsqueeze", [keys, emit.constant("axes", np.array([1, 2], np.int64))])
    one, two = emit.constant("same", np.ones(1, np.int64)), emit.constant("both", np.ones(2, np.int64))
    queries = emit("Shape", [query], start=1, end=2)
    return emit("Expand", [rows, emit("Concat", [two, queries, one], axis=0)])


def _seen_and_hidden(emit: _Emitter) -> tuple[ir.Value, ir.Value]:
    seen, hidden = (
        emit.constant(name, np.array(value, np.float32)) for name, value in (("seen", 0), ("hidden", -np.inf))
    )
    return seen, hidden


def _replace(graph: ir.Graph, read: CacheRead, shared: _Shared) -> None:
    emit = _Emitter(graph, read.node, str(read.node.outputs[0].name))
    rows = [_rows(emit, heads) for heads in (read.query, read.key, read.value)]
    (last, total), bias = shared.lengths(read, rows[0]), shared.bias(read, rows[0])
    options: dict[str, int | float] = {"num_heads": read.query.count, "kv_num_heads": read.key.count}
    scale = read.node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(read.query.size)
    options["scale"] = 1.0 if fold_factor(rows[0], scale) else scale
    angles: tuple[ir.Value | None, ...] = (None, None, None)
    if read.query.cos is not None:
        angles, options["do_rotary"] = shared.angles(read), 1
    new = ir.node(
        "GroupQueryAttention",
        [*rows, *(slot.past for slot in read.slots), last, total, *angles, bias, shared.sink(read)],
        options, domain=DOMAIN, num_outputs=3,
    )  # fmt: skip
    new.version = 1
    props = read.node.metadata_props
    new.metadata_props.update({key: props[key] for key in PROVENANCE if key in props})
    graph.insert_before(read.node, new)
    _take_over(read, new)
    for slot, present in zip(read.slots, new.outputs[1:]):
        old = slot.concat.outputs[0]
        present.shape, present.type = old.shape, old.type
        _rename(old, present)


def _rows(emit: _Emitter, heads: Heads) -> ir.Value:
    """x [B, S, n * d] of heads [B, n, S, d]."""
    transpose = producer(heads.x, "Transpose")
    split = producer(transpose.inputs[0], "Reshape") if transpose is not None and _swaps(transpose) else None
    if split is not None and split.inputs[0] is not None:
        x = split.inputs[0]
        if x.shape is not None and len(x.shape) == 3 and x.shape[2] == heads.count * heads.size:
            return x
    joined = emit.constant("joined", np.array([0, 0, heads.count * heads.size], np.int64))
    return emit("Reshape", [emit("Transpose", [heads.x], perm=[0, 2, 1, 3]), joined])


def _swaps(node: ir.Node) -> bool:
    """Whether a Transpose swaps heads and positions."""
    return list(node.attributes.get_ints("perm", ())) == [0, 2, 1, 3]


def _take_over(read: CacheRead, new: ir.Node) -> None:
    """Let what reads the attention read the new node, whose output is [B, S, H * d]: mostly rows are what is wanted."""
    result, rows = read.node.outputs[0], new.outputs[0]
    width = read.query.count * read.query.size
    transpose = only_use(result)
    joined = None
    if transpose is not None and transpose.op_type == "Transpose" and _swaps(transpose):
        joined = only_use(transpose.outputs[0])
    if joined is not None and joined.op_type == "Reshape":
        shape = joined.outputs[0].shape
        if shape is not None and len(shape) == 3 and shape[2] == width:
            old = joined.outputs[0]
            rows.shape, rows.type = old.shape, old.type
            _rename(old, rows)
            return
    rows.type = result.type
    emit = _Emitter(new.graph, read.node, str(result.name))  # type: ignore[arg-type]
    split = emit.constant("split", np.array([0, 0, read.query.count, read.query.size], np.int64))
    heads = emit("Transpose", [emit("Reshape", [rows, split])], perm=[0, 2, 1, 3])
    heads.shape, heads.type = result.shape, result.type
    _rename(result, heads)


def _rename(old: ir.Value, new: ir.Value) -> None:
    """Put a value in the place of another one, under its name."""
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{name}_before", name
