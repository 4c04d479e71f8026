"""Cut the source of a scatter to the shape of its index: torch reads that part alone, ONNX takes no other shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.ir.editor import Editor
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import dim_text

aten = torch.ops.aten

SCATTERS = frozenset({aten.scatter.src, aten.scatter_add.default, aten.scatter_reduce.two})
"""Calls (x, axis, index, source)."""


def cut_scatter_sources(program: Program) -> None:
    """Replace the source of each scatter by source[: index.shape[0], : index.shape[1], ...], in place."""
    with program.edit() as editor:
        for node in list(editor.graph.nodes):
            if node.target in SCATTERS:
                _cut(editor, node)


def _cut(editor: Editor, node: fx.Node) -> None:
    index: Any = node.args[2]
    source: Any = node.args[3]
    sizes, given = index.meta["val"].shape, source.meta["val"].shape
    for axis, (size, found) in enumerate(zip(sizes, given)):
        if dim_text(editor.program, size) == dim_text(editor.program, found):
            continue
        end = size if isinstance(size, int) else editor.call(aten.sym_size.int, index, axis, like=node)
        source = editor.call(aten.slice.Tensor, source, axis, 0, end, like=node)
    node.update_arg(3, source)
