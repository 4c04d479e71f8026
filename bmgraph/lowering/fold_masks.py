"""Folds constant boolean masks into the weights that they multiply."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers the custom operators)
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import KEY
from bmgraph.ir.program import Program
from bmgraph.ops.block_codes import block_arguments, block_size, pack_codes, unpack_codes, unpack_zeros
from bmgraph.utils.eight_bits import writable

MUL = torch.ops.aten.mul.Tensor
TRANSPOSE = torch.ops.aten.t.default
DEQUANTIZE = torch.ops.bmgraph.dequantize.default
DEQUANTIZE_BLOCKS = torch.ops.bmgraph.dequantize_blocks.default


def fold_masks(program: Program) -> None:
    """Replace `parameter * mask`, with a bool parameter or buffer as the mask, by one parameter, in place.

    `dequantize(codes, scale) * mask` becomes `dequantize(codes * mask, scale)`, packed codes likewise, also behind a transpose. The values
    stay the same, without the product at every call. Only for programs that are no longer trained.
    """
    for graph in program.graphs:
        with program.edit(graph) as editor:
            for node in list(editor.graph.nodes):
                if node.target is MUL and len(node.args) == 2 and _is_mask(program, node.args[1]):
                    _fold(editor, node)


def _is_mask(program: Program, node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "get_attr"
        and program.tensor(str(node.target)).dtype == torch.bool
    )


def _fold(editor: Editor, product: fx.Node) -> None:
    masked, mask = product.args
    assert isinstance(masked, fx.Node)
    assert isinstance(mask, fx.Node)
    if masked.target is DEQUANTIZE and masked.args[0].op == "get_attr":  # type: ignore[union-attr]
        codes = _masked(editor, masked.args[0], mask, alone=len(masked.users) == 1)  # type: ignore[arg-type]
        weight = editor.call(DEQUANTIZE, codes, *masked.args[1:], like=product)
    elif (blocks := _stored_blocks(masked)) is not None:
        kept = editor.program.tensor(str(mask.target))
        codes = _masked_blocks(
            editor, blocks, kept if blocks is masked else kept.t(), alone=len(masked.users) == 1
        )
        weight = editor.call(DEQUANTIZE_BLOCKS, codes, *blocks.args[1:], like=product)
        if blocks is not masked:
            weight = editor.call(TRANSPOSE, weight, like=product)
    elif masked.op == "get_attr" and str(masked.target) in editor.program.parameters:
        weight = _masked(editor, masked, mask)
        for key in ("site", KEY, "pass"):
            if key in product.meta:
                weight.meta[key] = product.meta[key]
    else:
        return
    editor.replace(product, weight)


def _stored_blocks(weight: fx.Node) -> fx.Node | None:
    """What makes a weight, or its transpose, of packed codes (and zero points, where there are some) that are parameters."""
    made: Any = weight.args[0] if weight.target is TRANSPOSE else weight
    if made.target is not DEQUANTIZE_BLOCKS:
        return None
    given = block_arguments(made)
    return made if all(item is None or item.op == "get_attr" for item in (given.codes, given.zero)) else None


def _masked(editor: Editor, reader: fx.Node, mask: fx.Node, alone: bool = True) -> fx.Node:
    """A reader of parameter * mask; `alone`: nothing else reads what is made of the parameter."""
    name = str(reader.target)
    value, kept = editor.program.tensor(name), editor.program.tensor(str(mask.target))
    return _stored(editor, reader, (writable(value) * kept).view(value.dtype), alone)


def _masked_blocks(editor: Editor, weight: fx.Node, kept: torch.Tensor, alone: bool) -> fx.Node:
    """A reader of the packed codes of a weight, with codes of zero where `kept` is not; `alone`: no other node than the masked one reads
    what its one reader gives."""
    program, given = editor.program, block_arguments(weight)
    packed, bits = program.tensor(str(given.codes.target)), given.bits
    block, alone = block_size(packed, bits), alone and len(weight.users) == 1
    codes = unpack_codes(packed, bits, given.columns)
    if given.zero is None:
        return _stored(editor, given.codes, pack_codes(codes * kept, bits, block), alone)
    zero = unpack_zeros(program.tensor(str(given.zero.target)), bits, packed.shape[-2])
    codes = torch.where(kept, codes, zero.repeat_interleave(block, -1)[..., : given.columns])
    return _stored(editor, given.codes, pack_codes(codes, bits, block, zero), alone)


def _stored(editor: Editor, reader: fx.Node, value: torch.Tensor, alone: bool) -> fx.Node:
    """A reader of a value: under the name that `reader` reads, unless another node of the graph reads that too."""
    name = str(reader.target)
    if alone and len(reader.users) == 1:
        return editor.assign(name, value)
    return editor.parameter(editor.fresh(f"{name}_masked"), value, like=reader, frozen=True)
