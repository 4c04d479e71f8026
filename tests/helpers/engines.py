"""The weight matrices of an ONNX engine, read from its file alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper

from bmgraph.backends.onnx.rewrites.graph_utils import PASS
from bmgraph.runtime.ort.bundle import MODEL_FILE
from bmgraph.runtime.ort.engine import OrtEngine

PRODUCTS = ("MatMul", "Gemm", "MatMulIntegerToFloat")


def matrices(engine: OrtEngine, without: str = "none") -> dict[str, np.ndarray[Any, Any]]:
    """Every constant matrix of a product as [inputs, outputs], as codes if quantized, by initializer name;
    matrices of nodes made by the pass named `without` are left out."""
    model = onnx.load(str(engine.folder / MODEL_FILE))
    constants = {item.name: item for item in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    found: dict[str, np.ndarray[Any, Any]] = {}
    for node in model.graph.node:
        stamps = {item.key: item.value for item in node.metadata_props}
        if node.op_type not in PRODUCTS or stamps.get(PASS, "").startswith(without):
            continue
        name = node.input[1]
        turned = node.op_type == "Gemm" and any(
            attribute.name == "transB" and attribute.i for attribute in node.attribute
        )
        while name not in constants and name in makers:
            maker = makers[name]
            if maker.op_type not in ("Transpose", "DequantizeLinear"):
                break
            turned ^= maker.op_type == "Transpose"
            name = maker.input[0]
        if name in constants:
            array = onnx.numpy_helper.to_array(constants[name])
            found[name] = array.T if turned else array
    return found


def has_mul_by_weights(engine: OrtEngine) -> bool:
    """Whether the engine still multiplies a matrix elementwise by another constant at run time."""
    model = onnx.load(str(engine.folder / MODEL_FILE), load_external_data=False)
    matrix = {item.name for item in model.graph.initializer if len(item.dims) == 2}
    return any(node.op_type == "Mul" and set(node.input) & matrix for node in model.graph.node)
