"""Write a split into parts of a free size as slices: the optimiser of ONNX models fails on its own form, SplitToSequence."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from bmgraph.ir.editor import Editor
from bmgraph.ir.program import Program

aten = torch.ops.aten


def slice_dynamic_splits(program: Program) -> None:
    """Replace `split` and `chunk` along an axis of a free size, in place; a part is x[..., i * step : (i + 1) * step]."""
    with program.edit() as editor:
        for node in list(editor.graph.nodes):
            if node.target in (aten.split.Tensor, aten.chunk.default):
                _slice(editor, node)


def _slice(editor: Editor, node: fx.Node) -> None:
    source: Any = node.args[0]
    axis: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    given: Any = node.args[1]
    if isinstance(source.meta["val"].shape[axis], int) and isinstance(given, int):
        return
    readers = list(node.users)
    assert all(reader.target is operator.getitem for reader in readers)
    step = given
    if node.target is aten.chunk.default:
        size = editor.call(aten.sym_size.int, source, axis, like=node)
        more = editor.call(operator.add, size, given - 1, like=node)
        step = editor.call(operator.floordiv, more, given, like=node)
    for reader in readers:
        index: Any = reader.args[1]
        begin, end = (_times(editor, step, count, node) for count in (index, index + 1))
        part = editor.call(aten.slice.Tensor, source, axis, begin, end, like=reader)
        part.meta["val"] = reader.meta["val"]  # the size that was traced, not an expression of its bounds
        reader.replace_all_uses_with(part)


def _times(editor: Editor, step: Any, count: int, like: fx.Node) -> Any:
    if isinstance(step, int):
        return step * count
    return 0 if count == 0 else step if count == 1 else editor.call(operator.mul, step, count, like=like)
