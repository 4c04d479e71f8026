"""Rotary positions that are written out (halves, negation, two products and a sum) become one operator."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import PROVENANCE, constant, only_use, producer, replace

FAR = 2**31
"""Where a slice ends that takes all that follows, or beyond."""


@dataclass(frozen=True)
class _Turn:
    """x [B, H, S, d] turned by angles [B, S, d / 2]: `last` is the sum that gives it."""

    x: ir.Value
    angles: ir.Value
    last: ir.Node


def use_rotary(model: ir.Model) -> int:
    """Replace every `x * cos(a) + turned(x) * sin(a)`, where a holds the same angles twice; returns their number.

    The angles must be those of each row of the batch: the operator takes no others.
    """
    graph = model.graph
    count = 0
    halves: dict[tuple[ir.Value, str], ir.Value] = {}
    for node in list(graph):
        found = _turn(node)
        if found is None:
            continue
        tables = [_table(graph, found, operator, halves) for operator in ("Cos", "Sin")]
        new = ir.node("RotaryEmbedding", [found.x, *tables])
        replace(graph, [node], new, node.outputs[0])
        count += 1
    return count


def _turn(node: ir.Node) -> _Turn | None:
    """The parts of a sum that turns something."""
    if node.op_type != "Add":
        return None
    for straight, across in (node.inputs, tuple(reversed(node.inputs))):
        one, other = _scaled(straight, "Cos"), _scaled(across, "Sin")
        if one is None or other is None or one[1] is not other[1]:
            continue
        x, angles = one
        if _turned(other[0]) is x and _fits(x, angles):
            return _Turn(x, angles, node)
    return None


def _scaled(value: ir.Value | None, operator: str) -> tuple[ir.Value, ir.Value] | None:
    """(y, angles) of y * Unsqueeze(operator(Concat(angles, angles)), 1)."""
    product = producer(value, "Mul")
    if product is None or value is None or only_use(value) is None:
        return None
    for y, table in (product.inputs, tuple(reversed(product.inputs))):
        spread = producer(table, "Unsqueeze")
        waves = producer(spread.inputs[0], operator) if spread is not None else None
        twice = producer(waves.inputs[0], "Concat") if waves is not None else None
        if spread is None or twice is None or y is None:
            continue
        axes = constant(spread.inputs[1])
        same = len(twice.inputs) == 2 and twice.inputs[0] is twice.inputs[1]
        angles = twice.inputs[0]
        if (
            same
            and angles is not None
            and axes is not None
            and axes.tolist() == [1]
            and _is_last(twice, angles)
        ):
            return y, angles
    return None


def _is_last(node: ir.Node, part: ir.Value) -> bool:
    """Whether a concatenation is along the last axis."""
    axis, shape = node.attributes.get_int("axis", 0), part.shape
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def _turned(value: ir.Value) -> ir.Value | None:
    """x of Concat(-x[..., half:], x[..., :half])."""
    joined = producer(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or only_use(value) is None:
        return None
    negated = producer(joined.inputs[0], "Neg")
    high = producer(negated.inputs[0], "Slice") if negated is not None else None
    low = producer(joined.inputs[1], "Slice")
    if high is None or low is None or high.inputs[0] is not low.inputs[0]:
        return None
    x = low.inputs[0]
    if x is None or x.shape is None or len(x.shape) != 4 or not isinstance(x.shape[3], int):
        return None
    half = x.shape[3] // 2
    fits = (
        _range(low) == (0, half) and _range(high) in {(half, None), (half, 2 * half)} and x.shape[3] % 2 == 0
    )
    return x if fits and _is_last(joined, x) else None


def _range(node: ir.Node) -> tuple[int, int | None] | None:
    """Where a slice of the last of four axes begins and ends (None: nowhere)."""
    values = [constant(item) for item in node.inputs[1:]]
    if len(values) < 3 or any(item is None or item.size != 1 for item in values):
        return None
    begin, end, axis, *step = (int(item.reshape(-1)[0]) for item in values if item is not None)
    if axis not in (3, -1) or step not in ([], [1]):
        return None
    return begin, None if end >= FAR else end


def _fits(x: ir.Value, angles: ir.Value) -> bool:
    """Whether the angles are of the rows and positions of x."""
    mine, theirs = x.shape, angles.shape
    if mine is None or theirs is None or len(theirs) != 3:
        return False
    return (mine[0], mine[2]) == (theirs[0], theirs[1]) and theirs[0] != 1


def _table(
    graph: ir.Graph, turn: _Turn, operator: str, made: dict[tuple[ir.Value, str], ir.Value]
) -> ir.Value:
    """operator(angles), computed once for all that are turned by them."""
    key = (turn.angles, operator)
    if key not in made:
        node = ir.node(operator, [turn.angles])
        source = turn.angles.producer()
        origin = source if source is not None else turn.last
        node.metadata_props.update(
            {key: origin.metadata_props[key] for key in PROVENANCE if key in origin.metadata_props}
        )
        node.outputs[0].name = f"{turn.angles.name}_{operator.lower()}"
        node.outputs[0].shape, node.outputs[0].type = turn.angles.shape, turn.angles.type
        if source is not None:
            graph.insert_after(source, node)
        else:
            graph.insert_before(graph[0], node)
        made[key] = node.outputs[0]
    return made[key]
