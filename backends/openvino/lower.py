"""The ONNX model that OpenVINO reads: standard operators alone, quantisation as pairs of QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import onnx_ir as ir
import torch

from bmgraph.analysis.structure.value_origins import stem
from bmgraph.backends.onnx.export import translate
from bmgraph.backends.onnx.lowerable import write_in_standard_calls
from bmgraph.backends.onnx.origins import name_nodes
from bmgraph.backends.onnx.pack_attention import fit_attention
from bmgraph.errors import BackendError
from bmgraph.ir.program import Program


def lower(program: Program) -> ir.Model:
    """Translate a deployed program, which is changed in place, to standard ONNX operators with unique node names.

    Raises BackendError for a call in float64, which OpenVINO would compute in float32, and for an operator that ONNX lacks.
    """
    write_in_standard_calls(program)
    _check_float64(program)
    fit_attention(program)
    model = translate(program)
    name_nodes(model)
    return model


def _check_float64(program: Program) -> None:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
            where = node.meta.get("site") or node.meta.get("scope") or "the model's root"
            raise BackendError(
                f"{stem(node)} of {where}, made by {node.meta.get('pass', 'capture')}, is in float64, which OpenVINO computes in "
                "float32: capture the model in float32 (model.float()), or take the backend onnx"
            )
