"""The exact GELU as ONNX Runtime's own operator, whose CPU kernel is the faster one."""

from __future__ import annotations

import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import DOMAIN, replace


def use_fast_gelu(model: ir.Model) -> int:
    """Replace every standard Gelu without approximation; returns their number."""
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
