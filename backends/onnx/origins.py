"""Where the nodes of a translated model come from, for the errors of the library that reads it."""

from __future__ import annotations

import onnx_ir as ir

from bmgraph.backends.onnx.export import scope_parts
from bmgraph.backends.onnx.rewrites.graph_utils import PASS, SCOPES, SITE


def name_nodes(model: ir.Model) -> None:
    """Give each node a name of its own, in place."""
    for index, node in enumerate(model.graph.all_nodes()):
        node.name = f"{node.op_type}_{index}"


def origin_of(node: ir.Node) -> str:
    """Operator, site, module path and pass of an ONNX node, for errors."""
    provenance = node.metadata_props
    site = provenance.get(SITE) or "unknown site"
    scopes = [part for part in scope_parts(provenance.get(SCOPES, "")) if part]
    scope = f" in {scopes[-2]}" if len(scopes) > 1 and not site.startswith(scopes[-2]) else ""
    return f"{node.op_type} of {site}{scope}, made by {provenance.get(PASS) or 'the exporter'}"
