"""Fuse rotary embeddings written as slices, negation, two products and a sum into RotaryEmbedding.

Shapes: B batch, H heads, S positions, d size of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import PROVENANCE, constant, only_use, producer, replace

OPEN_END = 2**31
"""A slice end of at least this means: to the end of the axis."""


@dataclass(frozen=True)
class _Rotary:
    """x [B, H, S, d], rotated by angles [B, S, d / 2] into the output of the Add node `last`."""

    x: ir.Value
    angles: ir.Value
    last: ir.Node


def use_rotary(model: ir.Model) -> int:
    """Replace every `x * cos(a) + rotate_half(x) * sin(a)` with a = concat(angles, angles); returns the count.

    The angles must have the batch axis of x: the operator does not broadcast them.
    """
    graph = model.graph
    count = 0
    tables: dict[tuple[ir.Value, str], ir.Value] = {}
    for node in list(graph):
        rotary = _match(node)
        if rotary is None:
            continue
        cos, sin = (_table(graph, rotary, operator, tables) for operator in ("Cos", "Sin"))
        new = ir.node("RotaryEmbedding", [rotary.x, cos, sin])
        replace(graph, [node], new, node.outputs[0])
        count += 1
    return count


def _match(node: ir.Node) -> _Rotary | None:
    """The rotary embedding that an Add computes, if it does."""
    if node.op_type != "Add":
        return None
    for left, right in (node.inputs, tuple(reversed(node.inputs))):
        cos_term, sin_term = _scaled(left, "Cos"), _scaled(right, "Sin")
        if cos_term is None or sin_term is None or cos_term[1] is not sin_term[1]:
            continue
        x, angles = cos_term
        if _rotated_half(sin_term[0]) is x and _same_rows(x, angles):
            return _Rotary(x, angles, node)
    return None


def _scaled(value: ir.Value | None, operator: str) -> tuple[ir.Value, ir.Value] | None:
    """(y, angles) if a value is y * Unsqueeze(operator(Concat(angles, angles)), 1)."""
    product = producer(value, "Mul")
    if product is None or value is None or only_use(value) is None:
        return None
    for y, table in (product.inputs, tuple(reversed(product.inputs))):
        unsqueeze = producer(table, "Unsqueeze")
        function = producer(unsqueeze.inputs[0], operator) if unsqueeze is not None else None
        concat = producer(function.inputs[0], "Concat") if function is not None else None
        if unsqueeze is None or concat is None or y is None:
            continue
        axes = constant(unsqueeze.inputs[1])
        repeated = len(concat.inputs) == 2 and concat.inputs[0] is concat.inputs[1]
        angles = concat.inputs[0]
        if (
            repeated
            and angles is not None
            and axes is not None
            and axes.tolist() == [1]
            and _joins_last_axis(concat, angles)
        ):
            return y, angles
    return None


def _joins_last_axis(node: ir.Node, part: ir.Value) -> bool:
    """Whether a Concat that reads `part` is along the last axis."""
    axis, shape = node.attributes.get_int("axis", 0), part.shape
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def _rotated_half(value: ir.Value) -> ir.Value | None:
    """x if a value is Concat(-x[..., half:], x[..., :half])."""
    concat = producer(value, "Concat")
    if concat is None or len(concat.inputs) != 2 or only_use(value) is None:
        return None
    negation = producer(concat.inputs[0], "Neg")
    high = producer(negation.inputs[0], "Slice") if negation is not None else None
    low = producer(concat.inputs[1], "Slice")
    if high is None or low is None or high.inputs[0] is not low.inputs[0]:
        return None
    x = low.inputs[0]
    if x is None or x.shape is None or len(x.shape) != 4 or not isinstance(x.shape[3], int):
        return None
    half = x.shape[3] // 2
    is_half = (
        _range(low) == (0, half) and _range(high) in {(half, None), (half, 2 * half)} and x.shape[3] % 2 == 0
    )
    return x if is_half and _joins_last_axis(concat, x) else None


def _range(node: ir.Node) -> tuple[int, int | None] | None:
    """Start and end of a slice of the last of four axes (end None: to the end); None for any other slice."""
    values = [constant(item) for item in node.inputs[1:]]
    if len(values) < 3 or any(item is None or item.size != 1 for item in values):
        return None
    start, end, axis, *step = (int(item.reshape(-1)[0]) for item in values if item is not None)
    if axis not in (3, -1) or step not in ([], [1]):
        return None
    return start, None if end >= OPEN_END else end


def _same_rows(x: ir.Value, angles: ir.Value) -> bool:
    """Whether the angles have the batch and positions of x, and a batch that is not broadcast."""
    x_shape, angle_shape = x.shape, angles.shape
    if x_shape is None or angle_shape is None or len(angle_shape) != 3:
        return False
    return (x_shape[0], x_shape[2]) == (angle_shape[0], angle_shape[1]) and angle_shape[0] != 1


def _table(
    graph: ir.Graph, rotary: _Rotary, operator: str, tables: dict[tuple[ir.Value, str], ir.Value]
) -> ir.Value:
    """operator(angles), cached in `tables` so that all rotations by the same angles share it."""
    key = (rotary.angles, operator)
    if key not in tables:
        node = ir.node(operator, [rotary.angles])
        source = rotary.angles.producer()
        origin = source if source is not None else rotary.last
        node.metadata_props.update(
            {key: origin.metadata_props[key] for key in PROVENANCE if key in origin.metadata_props}
        )
        node.outputs[0].name = f"{rotary.angles.name}_{operator.lower()}"
        node.outputs[0].shape, node.outputs[0].type = rotary.angles.shape, rotary.angles.type
        if source is not None:
            graph.insert_after(source, node)
        else:
            graph.insert_before(graph[0], node)
        tables[key] = node.outputs[0]
    return tables[key]
