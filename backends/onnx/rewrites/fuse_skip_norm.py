"""Fuse a residual sum and the RMS norm that reads it into SkipSimplifiedLayerNormalization.

One call less for each norm, which counts where a call has one row. Its sibling for LayerNormalization is five times slower than the two
operators on many rows, and is not used.
"""

from __future__ import annotations

import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import DOMAIN, PROVENANCE, producer

SUM = 3
"""Index of the output that holds the sum."""

RANKS = (2, 3)
"""The ranks of what the kernel adds."""


def fuse_skip_norms(model: ir.Model) -> int:
    """Replace `s = Add(x, y)` and `RMSNormalization(s, weight)` by one node that gives both, in decoders with a cache in place;
    returns the count."""
    graph = model.graph
    if not any(node.op_type == "GroupQueryAttention" for node in graph):
        return 0
    count = 0
    for node in list(graph):
        add = producer(node.inputs[0], "Add") if node.op_type == "RMSNormalization" else None
        if add is not None and _fits(node, add):
            _fuse(graph, node, add)
            count += 1
    return count


def _fits(norm: ir.Node, add: ir.Node) -> bool:
    """Whether the kernel has this form: two summands of the shape of their sum, f32, normalised along the last axis."""
    total, weight = add.outputs[0], norm.inputs[1]
    shapes = [value.shape if value is not None else None for value in (*add.inputs, total)]
    if (
        weight is None
        or weight.shape is None
        or len(weight.shape) != 1
        or any(shape is None for shape in shapes)
    ):
        return False
    rank = len(shapes[2])  # type: ignore[arg-type]
    if rank not in RANKS or shapes[0] != shapes[2] or shapes[1] != shapes[2]:
        return False
    if (
        norm.attributes.get_int("axis", -1) not in (-1, rank - 1)
        or norm.attributes.get_int("stash_type", 1) != 1
    ):
        return False
    return (
        total.dtype == ir.DataType.FLOAT and weight.dtype == ir.DataType.FLOAT and not total.is_graph_output()
    )


def _fuse(graph: ir.Graph, norm: ir.Node, add: ir.Node) -> None:
    total, result = add.outputs[0], norm.outputs[0]
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    new = ir.node(
        "SkipSimplifiedLayerNormalization", [*add.inputs, norm.inputs[1]], {"epsilon": epsilon}, domain=DOMAIN, num_outputs=4,
    )  # fmt: skip
    new.version = 1
    for node in (norm, add):
        for key in PROVENANCE:
            if key in node.metadata_props:
                new.metadata_props.setdefault(key, node.metadata_props[key])
    graph.insert_before(add, new)
    for value, other in ((result, new.outputs[0]), (total, new.outputs[SUM])):
        name = value.name
        other.shape, other.type = value.shape, value.type
        value.replace_all_uses_with(other, replace_graph_outputs=True)
        value.name, other.name = f"{name}_before", name
    for output in new.outputs[1:SUM]:
        output.name = ""
    graph.remove(norm, safe=True)
    graph.remove(add, safe=True)
