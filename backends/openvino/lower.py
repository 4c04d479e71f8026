"""The ONNX model that OpenVINO reads: standard operators alone, quantisation as pairs of QuantizeLinear and DequantizeLinear,
in the forms that its CPU plugin runs fastest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
import torch

from bmgraph.analysis.structure.value_origins import stem
from bmgraph.backends.onnx.export import translate
from bmgraph.backends.onnx.lowerable import write_in_standard_calls
from bmgraph.backends.onnx.origins import name_nodes
from bmgraph.backends.onnx.pack_attention import fit_attention, pack_attention
from bmgraph.backends.onnx.rewrites.drop_clip import drop_clips
from bmgraph.backends.onnx.rewrites.graph_utils import remove_dead
from bmgraph.backends.onnx.rewrites.quantize_before_concat import round_before_concat
from bmgraph.backends.openvino.attention_forms import hide_by_numbers, repeat_heads
from bmgraph.backends.openvino.fold_zero_points import fold_zero_points
from bmgraph.backends.openvino.known_sizes import write_known_sizes
from bmgraph.backends.openvino.matmul_attention import attention_translations
from bmgraph.backends.openvino.round_in_kernel import round_in_kernel
from bmgraph.errors import BackendError
from bmgraph.ir.program import Program
from bmgraph.ops.block_codes import block_arguments, block_size

BLOCK_BITS = (4, 8)
"""The sizes of codes in groups that OpenVINO reads."""

REWRITES: tuple[tuple[str, Callable[[ir.Model], int]], ...] = (
    ("round_before_concat", round_before_concat),
    ("drop_clips", drop_clips),
    ("fold_zero_points", fold_zero_points),
)
"""Name and function of each rewrite; a function edits the model in place and returns how many matches it rewrote."""


@dataclass(frozen=True)
class Lowered:
    """A model, the rewrites with the number of their matches, and the size of the blocks of their input that products of codes round
    to 8 bits, 0 where they do not."""

    model: ir.Model
    rewrites: list[tuple[str, int]]
    rounded_blocks: int


def lower(program: Program) -> Lowered:
    """Translate a deployed program, which is changed in place, to standard ONNX operators with unique node names.

    Raises BackendError for a call in float64, which OpenVINO would compute in float32, and for an operator that ONNX lacks.
    """
    write_in_standard_calls(program)
    _check_float64(program)
    _check_blocks(program)
    rounded_blocks = round_in_kernel(program)
    applied = [("attention_by_products", pack_attention(program)), ("repeat_heads", repeat_heads(program))]
    if program.cache is not None:
        applied.append(("hide_by_numbers", hide_by_numbers(program)))
        applied.append(("known_sizes", write_known_sizes(program)))
    fit_attention(program)
    model = translate(program, attention_translations())
    for name, rewrite in REWRITES:
        applied.append((name, rewrite(model)))
        remove_dead(model.graph)
    name_nodes(model)
    return Lowered(model, applied, rounded_blocks)


def _check_float64(program: Program) -> None:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
            where = node.meta.get("site") or node.meta.get("scope") or "the model's root"
            raise BackendError(
                f"{stem(node)} of {where}, made by {node.meta.get('pass', 'capture')}, is in float64, which OpenVINO computes in "
                "float32: capture the model in float32 (model.float()), or take the backend onnx"
            )


def _check_blocks(program: Program) -> None:
    """Raise BackendError for codes in groups that OpenVINO does not read: of other bits, or in groups that do not divide a row."""
    for node in program.graph.nodes:
        if node.target is not torch.ops.bmgraph.dequantize_blocks.default:
            continue
        given = block_arguments(node)
        bits, columns = given.bits, given.columns
        block = block_size(given.codes.meta["val"], bits)
        problem = ""
        if given.codes.meta["val"].dim() == 4:
            problem = "codes in groups for its experts, and OpenVINO has no kernel for those"
        elif bits not in BLOCK_BITS:
            problem = f"codes of {bits} bits, and OpenVINO reads {' or '.join(map(str, BLOCK_BITS))}: quantize in compile(...)"
        elif columns % block:
            problem = (
                f"groups of {block} of its {columns} inputs, and OpenVINO reads whole groups alone: choose a group that divides "
                "them"
            )
        if problem:
            raise BackendError(
                f"{node.meta.get('site', node.name)}: {node.meta.get('pass', 'its pass')} gave it {problem}, or leave the site out "
                "(exclude=)"
            )
