"""Mixtures in their normal form: a product with weights that ids pick from a stack is `experts_linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers experts_linear)
from bmgraph.ir.editor import Editor
from bmgraph.ir.matching import call, only_user

aten = torch.ops.aten


def fold_experts(editor: Editor) -> None:
    """`squeeze(bmm(index(W, [ids]), unsqueeze(x, -1)), -1)`, with W [E, O, I], becomes `experts_linear(x, W, ids)`.

    Where the ids of all tokens were laid out in one row, and tokens repeated to stand beside them, both are taken back:
    x is [tokens, I], and ids [tokens, K].
    """
    for product in list(editor.graph.nodes):
        if product.target is aten.bmm.default:
            _fold(editor, product)


def _fold(editor: Editor, product: fx.Node) -> None:
    picked, column = call(product.args[0], aten.index.Tensor), call(product.args[1], aten.unsqueeze.default)
    squeezed = call(only_user(product), aten.squeeze.dim)
    if picked is None or column is None or squeezed is None:
        return
    table, places = picked.args
    if not isinstance(table, fx.Node) or table.op != "get_attr" or table.meta["val"].dim() != 3:
        return
    if not isinstance(places, (list, tuple)) or len(places) != 1 or places[0] is None:
        return
    if column.args[1] not in (-1, 2) or squeezed.args[1] not in (-1, 2):
        return
    ids, count = _choice(editor, places[0], product)
    _, outputs, inputs = table.meta["val"].shape
    rows: Any = column.args[0]
    repeated = call(rows, aten.repeat_interleave.self_int)
    if repeated is not None and tuple(repeated.args[1:]) == (count, 0):
        rows = repeated.args[0]
    else:
        rows = editor.call(aten.reshape.default, rows, [-1, count, inputs], like=product)
    made = editor.call(torch.ops.bmgraph.experts_linear.default, rows, table, ids, like=product)
    editor.replace(squeezed, editor.call(aten.reshape.default, made, [-1, outputs], like=squeezed))


def _choice(editor: Editor, flat: Any, like: fx.Node) -> tuple[fx.Node, int]:
    """The ids of every token, [tokens, K], behind one row of them, and K."""
    laid_out = call(flat, aten.reshape.default)
    if laid_out is not None and laid_out.args[1] == [-1]:
        ids = laid_out.args[0]
        assert isinstance(ids, fx.Node)
        shape = ids.meta["val"].shape
        if len(shape) == 2 and isinstance(shape[1], int):
            return ids, shape[1]
    return editor.call(aten.unsqueeze.default, flat, -1, like=like), 1
