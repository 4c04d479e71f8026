"""Tensors that are joined and then rounded to integers are rounded first: bytes are joined, not floats."""

from __future__ import annotations

import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import PROVENANCE, constant, only_use, producer, replace


def round_before_concat(model: ir.Model) -> int:
    """Move every QuantizeLinear with one scale in front of the Concat that it alone reads; returns their number."""
    graph = model.graph
    count = 0
    for node in list(graph):
        if node.op_type != "QuantizeLinear":
            continue
        joined = producer(node.inputs[0], "Concat")
        scale = constant(node.inputs[1])
        if joined is None or scale is None or scale.size != 1 or only_use(joined.outputs[0]) is not node:
            continue
        parts = []
        for value in joined.inputs:
            assert value is not None
            rounding = ir.node("QuantizeLinear", [value, *node.inputs[1:]])
            rounding.metadata_props.update(
                {key: node.metadata_props[key] for key in PROVENANCE if key in node.metadata_props}
            )
            made = rounding.outputs[0]
            made.name = f"{value.name}_codes_of_{node.outputs[0].name}"
            made.type, made.shape = node.outputs[0].type, value.shape
            graph.insert_before(node, rounding)
            parts.append(made)
        replace(
            graph,
            [node],
            ir.node("Concat", parts, {"axis": joined.attributes.get_int("axis", 0)}),
            node.outputs[0],
        )
        count += 1
    return count
