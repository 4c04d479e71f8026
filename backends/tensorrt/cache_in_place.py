"""Let a decoder append to its KV cache in place: TensorScatter, which TensorRT reads as KVCacheUpdate, instead of Concat.

Concat copies the whole cache for every new token. Here past and present are one memory with room for C positions; the new ones are
written behind those that it holds, whose number is the size of the mask less the new ones.

Shapes: B rows, P cached positions, S new ones, C those that there is room for.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bmgraph.backends.onnx.origins import origin_of
from bmgraph.backends.onnx.rewrites.graph_utils import PROVENANCE, add_constant
from bmgraph.errors import BackendError
from bmgraph.ir.cache_spec import CacheLayout

OPSET = 24
"""The first opset with TensorScatter."""


def append_in_place(model: ir.Model, cache: CacheLayout, room: int) -> CacheLayout:
    """Let all parts of a cache have room for `room` positions, in place in `model`; returns the layout that says so.

    Raises BackendError, naming the site, where an attention reads its cache in another way than behind one Concat.
    """
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    sized = cache.mask if cache.mask is not None else cache.extent
    if sized is None:
        raise BackendError(
            "TensorRT(generate=True) needs a mask, whose size says how many positions are cached: capture the model with its attention "
            "mask"
        )
    made = _Counts(graph, inputs[cache.tokens], inputs[sized])
    for slot in cache.slots:
        past = inputs[slot.past]
        concat = _append_of(past, slot.present, slot.axis)
        for use in list(past.uses()):
            if use.node is not concat:
                _replace_count(graph, use.node, slot.axis, made.past)
        _scatter(graph, concat, slot.axis, room, made)
        past.shape = _with_room(past, slot.axis, room)
    graph.opset_imports[""] = model.opset_imports[""] = OPSET
    return cache.with_in_place({(slot.past, slot.present) for slot in cache.slots}, rows_alike=False)


class _Counts:
    """i64[1] of cached positions and of all, and i64[B] of where each row goes on."""

    def __init__(self, graph: ir.Graph, tokens: ir.Value, sized: ir.Value) -> None:
        first = graph[0]

        def add(operator: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Value:
            node = ir.node(operator, inputs, attributes)
            graph.insert_before(first, node)
            node.outputs[0].name, node.outputs[0].type = (
                f"cache.{name}",
                ir.TensorType(ir.DataType.INT64),
            )
            return node.outputs[0]

        self.total = add("Shape", [sized], "total", start=1, end=2)
        new = add("Shape", [tokens], "new", start=1, end=2)
        self.past = add("Sub", [self.total, new], "past")
        self.at = add("Expand", [self.past, add("Shape", [tokens], "rows", start=0, end=1)], "at")


def _append_of(past: ir.Value, present: str, axis: int) -> ir.Node:
    """The Concat that appends to a part of the cache and gives the output `present`."""
    for use in past.uses():
        node, output = use.node, use.node.outputs[0]
        if (
            node.op_type == "Concat"
            and output.name == present
            and output.is_graph_output()
            and node.inputs[0] is past
            and len(node.inputs) == 2
            and node.attributes.get_int("axis", 0) % len(past.shape or ()) == axis
        ):
            return node
    users = [origin_of(use.node) for use in past.uses()]
    raise BackendError(
        f"{users[0] if users else past.name}: its cache {past.name} is not appended to by one concatenation, so TensorRT cannot update it "
        "in place: take the backend onnx, or build without generate=True"
    )


def _replace_count(graph: ir.Graph, node: ir.Node, axis: int, count: ir.Value) -> None:
    """Let what reads how many positions a part of the cache holds read it elsewhere: the memory has room for more."""
    begin = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", -1)
    if node.op_type == "Shape" and (begin, end) == (axis, axis + 1):
        node.outputs[0].replace_all_uses_with(count)
        graph.remove(node, safe=True)
    elif node.op_type != "Shape" or "end" not in node.attributes or begin <= axis < end:
        raise BackendError(
            f"{origin_of(node)}: it reads the KV cache itself, which TensorRT updates in place: take the backend onnx, or build without "
            "generate=True"
        )


def _scatter(graph: ir.Graph, concat: ir.Node, axis: int, room: int, made: _Counts) -> None:
    """TensorScatter to the whole memory, of which attention reads the positions that are held."""
    old = concat.outputs[0]
    name = str(old.name)
    scatter = ir.node("TensorScatter", [*concat.inputs, made.at], {"axis": axis, "mode": "linear"})
    whole = scatter.outputs[0]
    whole.type, whole.shape = old.type, _with_room(old, axis, room)
    bounds = [
        add_constant(graph, f"cache.{what}", np.array([number], np.int64))
        for what, number in (("begin", 0), ("axis", axis))
    ]
    held = ir.node("Slice", [whole, bounds[0], made.total, bounds[1]])
    held.outputs[0].type, held.outputs[0].shape = old.type, old.shape
    for node in (scatter, held):
        for key in PROVENANCE:
            if key in concat.metadata_props:
                node.metadata_props[key] = concat.metadata_props[key]
        graph.insert_before(concat, node)
    for place, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[place] = whole
    old.replace_all_uses_with(held.outputs[0])
    graph.remove(concat, safe=True)
    whole.name, held.outputs[0].name = name, f"{name}.held"


def _with_room(value: ir.Value, axis: int, room: int) -> ir.Shape:
    return ir.Shape([room if place == axis else dim for place, dim in enumerate(value.shape or ())])
