"""Remove a Clip before a QuantizeLinear that saturates at the same bounds."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import constant, producer

CODE_RANGE = {"uint8": (0, 255), "int8": (-128, 127)}
"""Lowest and highest code of each dtype."""


def drop_clips(model: ir.Model) -> int:
    """Bypass every Clip whose bounds round to the outermost codes of the QuantizeLinear that reads it; returns the count."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "QuantizeLinear":
            continue
        if len(node.inputs) < 3:
            continue
        clip = producer(node.inputs[0], "Clip")
        scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
        if (
            clip is None
            or scale is None
            or zero is None
            or scale.size != 1
            or str(zero.dtype) not in CODE_RANGE
        ):
            continue
        low = constant(clip.inputs[1]) if len(clip.inputs) > 1 else None
        high = constant(clip.inputs[2]) if len(clip.inputs) > 2 else None
        bounded_below = len(clip.inputs) > 1 and clip.inputs[1] is not None
        if high is None or (bounded_below and low is None):
            continue
        lowest, highest = CODE_RANGE[str(zero.dtype)]
        same_low = low is None or _code(low, scale, zero) <= lowest
        if same_low and _code(high, scale, zero) >= highest:
            node.replace_input_with(0, clip.inputs[0])
            count += 1
    return count


def _code(value: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> float:
    """The code of a value, without saturation, as QuantizeLinear rounds it: in the value's precision, half to even."""
    return float(np.rint(value / scale).item()) + float(zero.item())
