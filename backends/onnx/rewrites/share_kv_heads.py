"""Keys and values that are repeated for each head of the queries are read by all of them instead.

The standard Attention shares heads of keys among those of queries by itself; behind a cache the copies would be made
anew, of all positions, for every token.
"""

from __future__ import annotations

import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import constant, producer

KEY, VALUE = 1, 2
"""The places of keys and values among the inputs of Attention."""


def share_heads(model: ir.Model) -> int:
    """Give every Attention its keys and values as they are before each head is repeated; returns their number."""
    count = 0
    for node in model.graph:
        if node.op_type != "Attention" or node.domain:
            continue
        narrow = [_narrow(node.inputs[place]) for place in (KEY, VALUE)]
        if narrow[0] is None or narrow[1] is None or _heads(narrow[0]) != _heads(narrow[1]):
            continue
        for place, value in zip((KEY, VALUE), narrow):
            node.replace_input_with(place, value)
        count += 1
    return count


def _narrow(value: ir.Value | None) -> ir.Value | None:
    """x [B, n, T, d] behind Reshape(Expand(Unsqueeze(x, 2))) [B, n * times, T, d]: each head is repeated in a row."""
    joined = producer(value, "Reshape")
    spread = producer(joined.inputs[0], "Expand") if joined is not None else None
    split = producer(spread.inputs[0], "Unsqueeze") if spread is not None else None
    if split is None or value is None:
        return None
    axes = constant(split.inputs[1])
    x = split.inputs[0]
    if axes is None or axes.tolist() != [2] or x is None:
        return None
    heads, wide = _heads(x), _heads(value)
    same_size = x.shape is not None and value.shape is not None and x.shape[-1] == value.shape[-1]
    return x if heads and wide and same_size and wide % heads == 0 else None


def _heads(value: ir.Value) -> int | None:
    """The number of heads of a value [B, heads, T, d]."""
    shape = value.shape
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int):
        return None
    return shape[1]
