"""Quantise the inputs of a Concat instead of its output: it then copies bytes, not floats."""

from __future__ import annotations

import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import PROVENANCE, constant, only_use, producer, replace


def round_before_concat(model: ir.Model) -> int:
    """Move per-tensor QuantizeLinear nodes before a Concat that nothing else reads; returns the count."""
    graph = model.graph
    count = 0
    for node in list(graph):
        if node.op_type != "QuantizeLinear":
            continue
        concat = producer(node.inputs[0], "Concat")
        scale = constant(node.inputs[1])
        if concat is None or scale is None or scale.size != 1 or only_use(concat.outputs[0]) is not node:
            continue
        parts = []
        for value in concat.inputs:
            assert value is not None
            quantize = ir.node("QuantizeLinear", [value, *node.inputs[1:]], dict(node.attributes))
            quantize.metadata_props.update(
                {key: node.metadata_props[key] for key in PROVENANCE if key in node.metadata_props}
            )
            codes = quantize.outputs[0]
            codes.name = f"{value.name}_codes_of_{node.outputs[0].name}"
            codes.type, codes.shape = node.outputs[0].type, value.shape
            graph.insert_before(node, quantize)
            parts.append(codes)
        replace(
            graph,
            [node],
            ir.node("Concat", parts, {"axis": concat.attributes.get_int("axis", 0)}),
            node.outputs[0],
        )
        count += 1
    return count
