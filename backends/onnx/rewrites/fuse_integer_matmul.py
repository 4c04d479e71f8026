"""Fuse products of quantised activations and 8-bit weights into MatMulIntegerToFloat.

`DequantizeLinear(codes) @ DequantizeLinear(weights) + bias` becomes one node with u8 activations and s8 weights laid out
[in, out], the combination that ONNX Runtime's CPU kernels run fastest.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import DOMAIN, add_constant, replace
from bmgraph.backends.onnx.rewrites.integer_product import IntegerProduct, integer_product


def fuse_integer_products(model: ir.Model) -> int:
    """Fuse every such MatMul or Gemm; returns the count."""
    graph = model.graph
    count = 0
    packed: dict[tuple[str, str, bool], tuple[ir.Value, ir.Value]] = {}
    for node in list(graph):
        product = integer_product(node)
        if product is not None:
            _fuse(graph, product, packed)
            count += 1
    if count:
        graph.opset_imports.setdefault(DOMAIN, 1)
        model.opset_imports.setdefault(DOMAIN, 1)
    return count


def _fuse(
    graph: ir.Graph,
    product: IntegerProduct,
    packed: dict[tuple[str, str, bool], tuple[ir.Value, ir.Value]],
) -> None:
    """Fuse one product. `packed` maps weights to their repacked constants."""
    codes, scale = product.weight.inputs[:2]
    assert codes is not None
    assert scale is not None
    name = str(codes.name)
    key = (name, str(scale.name), product.transposed)  # tied weights may be read in both layouts
    if key not in packed:
        layout = np.ascontiguousarray(product.codes.T) if product.transposed else product.codes
        packed[key] = (
            add_constant(graph, f"{name}_packed", layout),
            add_constant(graph, f"{name}_scale", product.scale),
        )
    matrix, scales = packed[key]
    quantised = product.activation.inputs
    new = ir.node(
        "MatMulIntegerToFloat", [quantised[0], matrix, quantised[1], scales, quantised[2], None, product.bias],
        domain=DOMAIN,
    )  # fmt: skip
    new.version = 1
    replace(graph, product.nodes, new, product.nodes[-1].outputs[0])
