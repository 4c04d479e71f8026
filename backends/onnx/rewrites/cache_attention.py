"""Attentions over a KV cache in a graph of ONNX: what they ask with, the parts of the cache that they read, and what their masks hide.

Shapes: B rows, S new positions, T all positions, H heads of queries, K of keys, d size of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import only_use, producer

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
class Heads:
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
class Slot:
    """A part of the cache: the input that holds it, what is appended, and the Concat that appends."""

    past: ir.Value
    new: ir.Value
    concat: ir.Node


@dataclass(frozen=True)
class CacheRead:
    """An attention over the cache."""

    node: ir.Node
    query: Heads
    key: Heads
    value: Heads
    slots: tuple[Slot, Slot]
    mask: ir.Value
    kind: Read
    carrier: ir.Value
    """An input [..., T], by its size; with Read.PADDING also by its values."""


def cache_read(node: ir.Node) -> CacheRead | None:
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
    heads = Heads(asking), Heads(slots[0].new), Heads(slots[1].new)
    if not _fits(*heads) or mask.shape is None or mask.dtype not in (ir.DataType.BOOL, ir.DataType.FLOAT):
        return None
    kind, _, names = node.metadata_props[CAUSAL].partition(":")
    carriers = [item for name in names.split(":") for item in node.graph.inputs if item.name == name]  # type: ignore[union-attr]
    query, key = _unrotated(heads[0]), _unrotated(heads[1])
    if query is not None and key is not None and _same_angles(query, key) and _made_of(query, carriers):
        heads = query, key, heads[2]
    carrier = carriers[0]
    return CacheRead(node, *heads, (slots[0], slots[1]), mask, Read(kind), carrier)


def _slot(reader: ir.Node, value: ir.Value | None) -> Slot | None:
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
    return Slot(past, new, concat)


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


def _fits(query: Heads, key: Heads, value: Heads) -> bool:
    """Whether the kernel has these numbers and sizes of heads."""
    return (
        query.size == key.size == value.size
        and query.size % HEAD_MULTIPLE == 0
        and key.count == value.count
        and query.count % key.count == 0
    )


def _unrotated(heads: Heads) -> Heads | None:
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
    return Heads(x, cos, sin) if cos.shape[2] == heads.size // 2 else None


def _made_of(heads: Heads, inputs: list[ir.Value]) -> bool:
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


def _same_angles(first: Heads, second: Heads) -> bool:
    return first.cos is second.cos and first.sin is second.sin
