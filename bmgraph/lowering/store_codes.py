"""Stores weights that trained in codes as these codes: what an engine multiplies is what training multiplied."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers our operators)
from bmgraph.analysis.interpreter import evaluate
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import KEY, NodeRole
from bmgraph.ir.program import Program
from bmgraph.ops.block_codes import pack_codes
from bmgraph.ops.fake_quantization import nearest_codes
from bmgraph.utils.stored_tensor import in_memory

ours = torch.ops.bmgraph
TRAINED = (ours.fake_quantize.default, ours.fake_quantize_blocks.default)


def trained_sites(program: Program) -> list[str]:
    """The sites whose weights are codes made anew of weights that train, in all graphs."""
    return list(
        dict.fromkeys(
            str(node.meta.get("site", node.name))
            for graph in program.graphs.values()
            for node in graph.nodes
            if node.target in TRAINED
        )
    )


def store_codes(program: Program, by: str = "") -> None:
    """Replace `fake_quantize(weight, step)` by `dequantize(codes, scale)`, in place, and those of blocks likewise: the values stay the
    same, bit by bit. `by` is the text of the pass that does so. Only for programs whose weights no longer train."""
    for name in program.graphs:
        with program.edit(name, by=by) as editor:
            for node in [item for item in editor.graph.nodes if item.target in TRAINED]:
                _store(editor, node)


def _store(editor: Editor, node: fx.Node) -> None:
    given: Any = node.args
    program, blocks = editor.program, node.target is TRAINED[1]
    x, step, axis, *form = given
    block, least, most = form if blocks else (0, *form)
    site = str(node.meta.get("site", node.name))
    value, scale = (in_memory(evaluate(program, item)) for item in (x, step))
    if least == -most:  # targets that take such codes take positive scales alone
        scale = scale.abs()
    codes = nearest_codes(value, scale, axis, block, least, most)
    rows = codes.T if axis and blocks else codes
    bits = int(most).bit_length() + 1
    stored = pack_codes(rows, bits, block) if blocks else codes
    readers = [
        editor.parameter(editor.fresh(f"{site}_{part}"), tensor, like=x, frozen=True, part=part)
        for part, tensor in ((NodeRole.CODES, stored), (NodeRole.SCALE, scale))
    ]
    role = str(node.meta.get(KEY) or "")
    if not blocks:
        made = editor.call(ours.dequantize.default, *readers, axis, like=node, site=site, part=role)
    else:
        columns = int(node.meta["val"].shape[1 - axis])
        made = editor.call(
            ours.dequantize_blocks.default, *readers, bits, columns, like=node, site=site, part="" if axis else role,
        )  # fmt: skip
        if axis:
            made = editor.call(torch.ops.aten.t.default, made, like=node, site=site, part=role)
    node.replace_all_uses_with(made)
