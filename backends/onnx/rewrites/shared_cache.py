"""Let attention append to the KV cache in place: GroupQueryAttention instead of Concat and Attention.

Concat copies the whole cache for every new token. GroupQueryAttention takes a cache that is longer than the positions in it and writes
the new ones where they belong, if past and present are the same memory; where they are not, it copies as Concat does.

Shapes: B rows, S new positions, T all positions, C those that the cache has room for, H heads of queries, K of keys, d size of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import (
    DOMAIN,
    PROVENANCE,
    add_constant,
    only_use,
    producer,
)

CAUSAL = "bmgraph.causal"
"""Key of the metadata of an Attention node whose mask hides every key after the query's own position: `READ:INPUT`, a `Read` and the
name of an input [..., T] whose size is the number of all positions; then, with `:`, that of the input that numbers positions."""


class Read(StrEnum):
    """What a mask hides beside every key after the query's own position."""

    NOTHING = "nothing"
    PADDING = "padding"
    """The keys where the input i[B, T] of all positions is zero."""
    ANYTHING = "anything"
    """Others, or it adds to scores."""


HEAD_MULTIPLE, ROTARY_MULTIPLE = 8, 16
"""What the size of a head must be a multiple of: in the kernel, and where it rotates queries and keys itself."""

QUERY, KEY, VALUE, MASK = 0, 1, 2, 3
"""Input indices of Attention."""


@dataclass(frozen=True)
class _Heads:
    """Queries, keys or values f[B, n, S, d]; cos and sin f[B, S, d / 2] where they are rotated."""

    x: ir.Value
    cos: ir.Value | None = None
    sin: ir.Value | None = None

    @property
    def count(self) -> int:
        """The number of heads n."""
        return int(self.x.shape[1])  # type: ignore[index,arg-type]

    @property
    def size(self) -> int:
        """The size d of a head."""
        return int(self.x.shape[3])  # type: ignore[index,arg-type]


@dataclass(frozen=True)
class _Slot:
    """A part of the cache: the input that holds it, what is appended, and the Concat that appends."""

    past: ir.Value
    new: ir.Value
    concat: ir.Node


@dataclass(frozen=True)
class _Read:
    """An attention over the cache."""

    node: ir.Node
    query: _Heads
    key: _Heads
    value: _Heads
    slots: tuple[_Slot, _Slot]
    mask: ir.Value
    kind: Read
    carrier: ir.Value
    """An input [..., T], by its size; with Read.PADDING also by its values."""


def append_in_place(model: ir.Model) -> int:
    """Replace every marked Attention over `Concat(past, new)`, if the kernel has the form of all that read the cache; returns the
    count."""
    graph = model.graph
    shared = _Shared(graph)
    reads = [read for node in graph if (read := _match(node)) is not None]
    if not reads or {slot.past for read in reads for slot in read.slots} != _appended(graph):
        return 0
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


def _match(node: ir.Node) -> _Read | None:
    """The attention over the cache that a node is, if the kernel has its form."""
    if node.op_type != "Attention" or node.domain or CAUSAL not in node.metadata_props:
        return None
    inputs = [*node.inputs, None, None, None]
    if any(value is not None for value in inputs[4:]) or any(value.uses() for value in node.outputs[1:]):
        return None
    attributes = node.attributes
    capped = attributes.get_float("softcap", 0.0) != 0.0
    if attributes.get_int("is_causal", 0) or capped:
        return None
    slots = _slot(node, inputs[KEY]), _slot(node, inputs[VALUE])
    mask, asking = inputs[MASK], inputs[QUERY]
    if slots[0] is None or slots[1] is None or mask is None or asking is None:
        return None
    if not _has_heads(asking) or not all(_has_heads(slot.new) for slot in slots if slot is not None):
        return None
    heads = _Heads(asking), _Heads(slots[0].new), _Heads(slots[1].new)
    if not _fits(*heads) or mask.shape is None or mask.dtype not in (ir.DataType.BOOL, ir.DataType.FLOAT):
        return None
    kind, _, names = node.metadata_props[CAUSAL].partition(":")
    carriers = [item for name in names.split(":") for item in node.graph.inputs if item.name == name]  # type: ignore[union-attr]
    query, key = _unrotated(heads[0]), _unrotated(heads[1])
    if query is not None and key is not None and _same_angles(query, key) and _made_of(query, carriers):
        heads = query, key, heads[2]
    carrier = carriers[0]
    return _Read(node, *heads, (slots[0], slots[1]), mask, Read(kind), carrier)


def _slot(reader: ir.Node, value: ir.Value | None) -> _Slot | None:
    """The part of the cache that a value f[B, K, T, d] is, if nothing but `reader` and the graph's outputs reads it."""
    concat = producer(value, "Concat")
    if (
        concat is None
        or value is None
        or len(concat.inputs) != 2
        or concat.attributes.get_int("axis", 0) not in (2, -2)
    ):
        return None
    past, new = concat.inputs
    if past is None or new is None or not past.is_graph_input() or len(past.uses()) != 1:
        return None
    if (
        not value.is_graph_output()
        or any(use.node is not reader for use in value.uses())
        or len(value.uses()) != 1
    ):
        return None
    return _Slot(past, new, concat)


def _has_heads(value: ir.Value) -> bool:
    """Whether a value is f32[B, n, S, d] with a known number and size of heads."""
    shape = value.shape
    return (
        value.dtype == ir.DataType.FLOAT
        and shape is not None
        and len(shape) == 4
        and isinstance(shape[1], int)
        and isinstance(shape[3], int)
    )


def _fits(query: _Heads, key: _Heads, value: _Heads) -> bool:
    """Whether the kernel has these numbers and sizes of heads."""
    return (
        query.size == key.size == value.size
        and query.size % HEAD_MULTIPLE == 0
        and key.count == value.count
        and query.count % key.count == 0
    )


def _unrotated(heads: _Heads) -> _Heads | None:
    """Heads before their rotation over their whole size, with its angles; None if they are not rotated so."""
    rotary = producer(heads.x, "RotaryEmbedding")
    if rotary is None or rotary.domain or only_use(heads.x) is None or heads.size % ROTARY_MULTIPLE:
        return None
    if len(rotary.inputs) > 3 and rotary.inputs[3] is not None:
        return None
    if any(rotary.attributes.get_int(name, 0) for name in ("interleaved", "rotary_embedding_dim")):
        return None
    x, cos, sin = rotary.inputs[:3]
    if (
        x is None
        or cos is None
        or sin is None
        or not _has_heads(x)
        or cos.shape is None
        or len(cos.shape) != 3
    ):
        return None
    return _Heads(x, cos, sin) if cos.shape[2] == heads.size // 2 else None


def _made_of(heads: _Heads, inputs: list[ir.Value]) -> bool:
    """Whether angles depend on the values of no other inputs."""
    pending, seen = [heads.cos, heads.sin], set[ir.Value]()
    while pending:
        value = pending.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        if value.is_graph_input() and value not in inputs:
            return False
        node = value.producer()
        if node is not None and node.op_type not in ("Shape", "Size"):
            pending.extend(node.inputs)
    return True


def _same_angles(first: _Heads, second: _Heads) -> bool:
    return first.cos is second.cos and first.sin is second.sin


class _Shared:
    """Values that all attentions over one mask, or with the same angles, read; each is made once, before the first of them."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[object, ...], tuple[ir.Value, ...]] = {}

    def lengths(self, read: _Read, query: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The last position of each row i32[B], and the number of positions T i32[1]; `query` is f[B, S, H * d]."""
        key = ("lengths", read.carrier)
        if key not in self._made:
            emit = _Emitter(self._graph, read.node, str(read.carrier.name))
            total = emit("Cast", [self._total(emit, read)], to=int(ir.DataType.INT32))
            last = emit("Sub", [total, emit.constant("one", np.array([1], np.int32))])
            self._made[key] = emit("Expand", [last, emit("Shape", [query], start=0, end=1)]), total
        last, total = self._made[key]
        return last, total

    def bias(self, read: _Read, query: ir.Value) -> ir.Value | None:
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

    def _total(self, emit: _Emitter, read: _Read) -> ir.Value:
        return emit("Shape", [read.carrier], start=1, end=2)

    def angles(self, read: _Read) -> tuple[ir.Value, ir.Value, ir.Value]:
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


def _replace(graph: ir.Graph, read: _Read, shared: _Shared) -> None:
    emit = _Emitter(graph, read.node, str(read.node.outputs[0].name))
    rows = [_rows(emit, heads) for heads in (read.query, read.key, read.value)]
    (last, total), bias = shared.lengths(read, rows[0]), shared.bias(read, rows[0])
    options: dict[str, int | float] = {"num_heads": read.query.count, "kv_num_heads": read.key.count}
    scale = read.node.attributes.get_float("scale", 0.0)
    if scale:
        options["scale"] = scale
    angles: tuple[ir.Value | None, ...] = (None, None, None)
    if read.query.cos is not None:
        angles, options["do_rotary"] = shared.angles(read), 1
    new = ir.node(
        "GroupQueryAttention",
        [*rows, *(slot.past for slot in read.slots), last, total, *angles, bias],
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


def _rows(emit: _Emitter, heads: _Heads) -> ir.Value:
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


def _take_over(read: _Read, new: ir.Node) -> None:
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
