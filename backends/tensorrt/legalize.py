"""The ONNX model that TensorRT parses; unsupported quantisation is reported with its site before parsing."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers our operators)
from bmgraph.backends.onnx.complex_pairs import write_complex_as_pairs
from bmgraph.backends.onnx.export import translate
from bmgraph.backends.onnx.origins import name_nodes
from bmgraph.backends.onnx.pack_attention import fit_attention
from bmgraph.backends.onnx.scatter_sources import cut_scatter_sources
from bmgraph.errors import BackendError
from bmgraph.ir.program import Program
from bmgraph.ops.block_codes import block_arguments, block_size
from bmgraph.utils.eight_bits import is_float8

ours = torch.ops.bmgraph


def check_quantization(program: Program) -> None:
    """Raise BackendError for activation quantisation that TensorRT does not support, naming its site and pass.

    TensorRT supports s8 and fp8 codes with a static scale and zero point 0.
    """
    _check_blocks(program)
    for node in program.graph.nodes:
        _check_float_codes(node)
        problem = _unsupported(program, node)
        if problem:
            site, maker = node.meta.get("site", node.name), node.meta.get("pass", "capture")
            raise BackendError(
                f"{site}: {maker} quantises its activation {problem}, which TensorRT does not support (it needs s8 or fp8 codes with "
                'a static scale and zero point 0): quantise in compile(..., backend="tensorrt", calibration=...)'
            )


def _check_blocks(program: Program) -> None:
    """Raise BackendError for codes of blocks that TensorRT does not support: it has 4-bit weights of products, in whole blocks,
    with positive scales and no zero points."""
    for node in program.graph.nodes:
        if node.target is not ours.dequantize_blocks.default:
            continue
        given = block_arguments(node)
        readers = list(node.users)
        while any(reader.target is torch.ops.aten.t.default for reader in readers):
            readers = [
                user
                for item in readers
                for user in (item.users if item.target is torch.ops.aten.t.default else [item])
            ]
        other = next((item for item in readers if item.target is not torch.ops.aten.linear.default), None)
        block = block_size(given.codes.meta["val"], given.bits)
        problem = ""
        if other is not None:
            problem = f"are read by {other.target}: leave the site out (exclude=)"
        elif given.bits != 4:
            problem = f"have {given.bits} bits: it takes 4"
        elif given.zero is not None:
            problem = "have zero points: quantise without symmetric=False"
        elif given.columns % block:
            problem = f"are of {given.columns} inputs in groups of {block}: choose a group that divides them"
        elif not bool((program.tensor(str(given.scale.target)) > 0).all()):
            problem = 'have negative scales: quantise in compile(..., backend="tensorrt")'
        if problem:
            raise BackendError(
                f"{node.meta.get('site', node.name)}: TensorRT does not support its codes, which {problem}"
            )


def _check_float_codes(node: fx.Node) -> None:
    """Raise BackendError for fp8 codes of experts: TensorRT takes no part of them before they are dequantized."""
    if node.target is not ours.dequantize.default:
        return
    codes = node.args[0]
    assert isinstance(codes, fx.Node)
    if is_float8(codes.meta["val"].dtype) and codes.meta["val"].dim() == 3:
        raise BackendError(
            f"{node.meta.get('site', node.name)}: TensorRT does not support experts in fp8: quantise them to int8, or leave them out "
            "(exclude=)"
        )


def _unsupported(program: Program, node: fx.Node) -> str:
    """What TensorRT does not support in a quantisation node, as the end of a sentence; empty if nothing."""
    if node.target is ours.quantize_dynamic.default:
        return "with a scale measured at each call"
    if node.target is not ours.quantize_static.default:
        return ""
    zero_node = node.args[2]
    assert isinstance(zero_node, fx.Node)
    zero = program.tensor(str(zero_node.target))
    if zero.dtype in (torch.int8, torch.float8_e4m3fn) and not bool(zero.float().any()):
        return ""
    return f"to {str(zero.dtype).removeprefix('torch.')} codes with zero point {zero.flatten()[0].item()}"


def lower(program: Program) -> ir.Model:
    """Translate a deployed program to standard ONNX operators with unique node names; changes `program` in place."""
    write_complex_as_pairs(program)
    cut_scatter_sources(program)
    fit_attention(program)
    _write_sizes(program)
    model = translate(program)
    name_nodes(model)
    for node in model.graph.all_nodes():
        if node.op_type == "Attention":
            _allow_decomposition(node)
    return model


def _write_sizes(program: Program) -> None:
    """Write the fixed sizes that a reshape leaves open: TensorRT would not know them beside sizes that are free."""
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.reshape.default:
            continue
        sizes = list(node.args[1])
        place = next(
            (place for place, size in enumerate(sizes) if isinstance(size, int) and size == -1), None
        )
        if place is not None and isinstance(known := node.meta["val"].shape[place], int):
            sizes[place] = known
            node.args = (node.args[0], sizes)


def _allow_decomposition(node: ir.Node) -> None:
    """Let TensorRT split attention into several kernels where no fused one supports its dtypes and sizes."""
    node.attributes.add(ir.AttrInt64("TRT_decomposable", 1))
