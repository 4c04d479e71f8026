"""A program in the ONNX that TensorRT takes: what it refuses is told before it is asked, with the site."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers our operators)
from bmgraph.backends.onnx.export import translate
from bmgraph.backends.onnx.pack_attention import widen_masks
from bmgraph.errors import BackendError
from bmgraph.ir.program import Program

ours = torch.ops.bmgraph


def check_forms(program: Program) -> None:
    """Raise BackendError for a rounding that TensorRT has no kernel for, naming its site and pass.

    It takes static scales and codes of s8 with zero point 0.
    """
    for node in program.graph.nodes:
        how = _refused(program, node)
        if how:
            site, made = node.meta.get("site", node.name), node.meta.get("pass", "capture")
            raise BackendError(
                f"{site}: {made} rounds its activation {how}, which TensorRT does not take (it takes s8 codes with a "
                'static scale and zero point 0): quantise for it, in compile(..., backend="tensorrt", calibration=...)'
            )


def _refused(program: Program, node: fx.Node) -> str:
    if node.target is ours.quantize_dynamic.default:
        return "with a scale measured at each call"
    if node.target is not ours.quantize_static.default:
        return ""
    zero_node = node.args[2]
    assert isinstance(zero_node, fx.Node)
    zero = program.tensor(str(zero_node.target))
    if zero.dtype is torch.int8 and not bool(zero.any()):
        return ""
    return f"to {str(zero.dtype).removeprefix('torch.')} codes with zero point {zero.flatten()[0].item()}"


def lower(program: Program) -> ir.Model:
    """The ONNX form of a deployed program (which it changes), of standard operators, each under a name of its own."""
    widen_masks(program)
    model = translate(program)
    for index, node in enumerate(model.graph.all_nodes()):
        node.name = f"{node.op_type}_{index}"
        if node.op_type == "Attention":
            _let_decompose(node)
    return model


def _let_decompose(node: ir.Node) -> None:
    """Where no fused kernel exists for its types and sizes, attention may run as several."""
    node.attributes.add(ir.AttrInt64("TRT_decomposable", 1))
