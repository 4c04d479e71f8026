"""Leave the rounding of blocks of a product's input to OpenVINO, whose kernels for weights in codes do it on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.ir.editor import remove_dead
from bmgraph.ir.program import Program
from bmgraph.ops.block_codes import block_arguments, block_size

aten = torch.ops.aten
ours = torch.ops.bmgraph

CODES = (ours.dequantize_blocks.default, ours.dequantize.default)
"""What makes a weight of codes, which the kernels read as such."""


def round_in_kernel(program: Program) -> int:
    """Drop the rounding of blocks, in place, where the kernels will do it; returns the size of the blocks, 0 where nothing changes.

    The kernels round the inputs of all products of codes of a model, or of none (`DYNAMIC_QUANTIZATION_GROUP_SIZE`): so all have to
    be rounded by blocks of one size, that of their codes, and nothing else may read what was rounded.
    """
    products = [
        (node, weight)
        for node in program.graph.nodes
        if node.target is aten.linear.default and (weight := _codes_of(node.args[1])) is not None
    ]
    sizes, rounded = set[int](), dict[fx.Node, None]()
    for node, weight in products:
        source = _rounding_of(node.args[0])
        if source is None or weight.target is not CODES[0]:
            return 0
        given = block_arguments(weight)
        sizes |= {int(source.args[1]), block_size(given.codes.meta["val"], given.bits)}  # type: ignore[arg-type]
        rounded[source] = None
    readers = {node for node, _ in products}
    if len(sizes) != 1 or not all(_only_for(node, readers) for node in rounded):
        return 0
    with program.edit():
        for node in rounded:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    remove_dead(program)
    return sizes.pop()


def _codes_of(node: Any) -> fx.Node | None:
    """The call that makes a weight of codes, behind transposes; None for another weight."""
    while isinstance(node, fx.Node) and node.target is aten.t.default:
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.target in CODES else None


def _rounding_of(x: Any) -> fx.Node | None:
    """The rounding of blocks that an input comes from, of which positions may be picked, such as the last; None without one."""
    if x.target is aten.index_select.default and x.args[1] in range(x.meta["val"].dim() - 1):
        x = x.args[0]
    return x if x.target is ours.quantize_blocks.default else None


def _only_for(rounded: fx.Node, products: set[fx.Node]) -> bool:
    """Whether products alone read what was rounded, or positions of it."""
    readers = [
        reader
        for user in rounded.users
        for reader in (user.users if user.target is aten.index_select.default else [user])
    ]
    return products.issuperset(readers)
