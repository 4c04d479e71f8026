"""Replace exact GELU by ONNX Runtime's contrib operator, whose CPU kernel is faster."""

from __future__ import annotations

import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import DOMAIN, replace


def use_fast_gelu(model: ir.Model) -> int:
    """Replace every standard Gelu without approximation; returns the count."""
    count = 0
    for node in list(model.graph):
        if (
            node.op_type != "Gelu"
            or node.domain == DOMAIN
            or node.attributes.get_string("approximate", "none") != "none"
        ):
            continue
        new = ir.node("Gelu", [node.inputs[0]], domain=DOMAIN)
        new.version = 1
        replace(model.graph, [node], new, node.outputs[0])
        count += 1
    if count:
        model.opset_imports.setdefault(DOMAIN, 1)
    return count
