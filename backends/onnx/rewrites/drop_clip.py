"""A clip in front of a rounding to integers that saturates there anyway is nothing."""

from __future__ import annotations

import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import constant, producer

SLACK = 0.51
"""How many steps of the rounding the clip may lie beyond its last code: the same code is reached."""

ENDS = {"uint8": (0, 255), "int8": (-128, 127)}
"""First and last code of a type."""


def drop_clips(model: ir.Model) -> int:
    """Let QuantizeLinear read what a Clip reads, where the clip's bounds are the ends of its range."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "QuantizeLinear":
            continue
        if len(node.inputs) < 3:
            continue
        clip = producer(node.inputs[0], "Clip")
        scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
        if clip is None or scale is None or zero is None or scale.size != 1 or str(zero.dtype) not in ENDS:
            continue
        low = constant(clip.inputs[1]) if len(clip.inputs) > 1 else None
        high = constant(clip.inputs[2]) if len(clip.inputs) > 2 else None
        bounded_below = len(clip.inputs) > 1 and clip.inputs[1] is not None
        if high is None or (bounded_below and low is None):
            continue
        first, last = ((end - float(zero)) * float(scale) for end in ENDS[str(zero.dtype)])
        above = abs(float(high) - last) <= SLACK * float(scale)
        below = low is None or abs(float(low) - first) <= SLACK * float(scale)
        if above and below:
            node.replace_input_with(0, clip.inputs[0])
            count += 1
    return count
