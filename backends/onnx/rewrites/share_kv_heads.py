"""Drop the repetition of key and value heads before Attention, which shares them among query heads itself.

With a KV cache the copies would be made again for all positions at every token.
"""

from __future__ import annotations

import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import constant, producer

KEY, VALUE = 1, 2
"""Input indices of Attention."""


def share_heads(model: ir.Model) -> int:
    """Give every Attention its keys and values from before the repetition; returns the count."""
    count = 0
    for node in model.graph:
        if node.op_type != "Attention" or node.domain:
            continue
        key, value = _unrepeated(node.inputs[KEY]), _unrepeated(node.inputs[VALUE])
        if key is None or value is None or _heads(key) != _heads(value):
            continue
        node.replace_input_with(KEY, key)
        node.replace_input_with(VALUE, value)
        count += 1
    return count


def _unrepeated(value: ir.Value | None) -> ir.Value | None:
    """x [B, n, T, d] of Reshape(Expand(Unsqueeze(x, 2))) [B, n * times, T, d], or x [B, 1, T, d] of Expand(x) [B, times, T, d]; None for
    anything else."""
    single = producer(value, "Expand")
    if single is not None and value is not None:
        x = single.inputs[0]
        return x if x is not None and _heads(x) == 1 and _heads(value) and _same_sizes(x, value) else None
    reshape = producer(value, "Reshape")
    expand = producer(reshape.inputs[0], "Expand") if reshape is not None else None
    unsqueeze = producer(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if unsqueeze is None or value is None:
        return None
    axes = constant(unsqueeze.inputs[1])
    x = unsqueeze.inputs[0]
    if axes is None or axes.tolist() != [2] or x is None:
        return None
    heads, repeated = _heads(x), _heads(value)
    if not heads or not repeated or repeated % heads:
        return None
    return x if _same_sizes(x, value) else None


def _same_sizes(x: ir.Value, value: ir.Value) -> bool:
    """Whether all axes of both but that of heads are known to have the same sizes."""
    return all(_same_size(x, value, axis) for axis in (0, 2, 3))


def _same_size(x: ir.Value, value: ir.Value, axis: int) -> bool:
    """Whether an axis of both is known to have one size: the Expand may have repeated more than the heads."""
    assert x.shape is not None
    assert value.shape is not None
    mine, theirs = x.shape[axis], value.shape[axis]
    return mine == theirs and (isinstance(mine, int) or mine.value is not None)


def _heads(value: ir.Value) -> int | None:
    """The heads of a value [B, heads, T, d]; None if unknown."""
    shape = value.shape
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int):
        return None
    return shape[1]
