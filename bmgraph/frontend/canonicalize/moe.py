"""Rewrite the product of tokens with gathered expert weights as `experts_linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers experts_linear)
from bmgraph.analysis.value_ranges import chosen_by_scores, never_negative
from bmgraph.ir.editor import Editor
from bmgraph.ir.matching import call, only_user

aten = torch.ops.aten


def fold_experts(editor: Editor) -> None:
    """Rewrite `squeeze(bmm(index(W, [ids]), unsqueeze(x, -1)), -1)`, with W [E, O, I], as `experts_linear(x, W, ids)`.

    Flattened ids [tokens * K] and tokens repeated to match them [tokens * K, I] become ids [tokens, K] and
    x [tokens, I].
    """
    for product in list(editor.graph.nodes):
        if product.target is aten.bmm.default:
            _fold(editor, product)


def _fold(editor: Editor, product: fx.Node) -> None:
    gathered, column = call(product.args[0], aten.index.Tensor), call(product.args[1], aten.unsqueeze.default)
    squeezed = call(only_user(product), aten.squeeze.dim)
    if gathered is None or column is None or squeezed is None:
        return
    stack, indices = gathered.args
    if not isinstance(stack, fx.Node) or stack.op != "get_attr" or stack.meta["val"].dim() != 3:
        return
    if not isinstance(indices, (list, tuple)) or len(indices) != 1 or not isinstance(indices[0], fx.Node):
        return
    if not (never_negative(editor.program, indices[0]) or chosen_by_scores(indices[0])):
        return  # an index may count from the end, an expert's number may not
    if column.args[1] not in (-1, 2) or squeezed.args[1] not in (-1, 2):
        return
    ids, count = _token_ids(editor, indices[0], product)
    _, outputs, inputs = stack.meta["val"].shape
    rows: Any = column.args[0]
    repeated = call(rows, aten.repeat_interleave.self_int)
    if repeated is not None and tuple(repeated.args[1:]) == (count, 0):
        rows = repeated.args[0]
    else:
        rows = editor.call(aten.reshape.default, rows, [-1, count, inputs], like=product)
    result = editor.call(torch.ops.bmgraph.experts_linear.default, rows, stack, ids, like=product)
    editor.replace(squeezed, editor.call(aten.reshape.default, result, [-1, outputs], like=squeezed))


def _token_ids(editor: Editor, flat: Any, like: fx.Node) -> tuple[fx.Node, int]:
    """The expert ids [tokens, K] of flattened ids, and K; ids that were not flattened have K = 1."""
    flattened = call(flat, aten.reshape.default)
    if flattened is not None and flattened.args[1] == [-1]:
        ids = flattened.args[0]
        assert isinstance(ids, fx.Node)
        shape = ids.meta["val"].shape
        if len(shape) == 2 and isinstance(shape[1], int):
            return ids, shape[1]
    return editor.call(aten.unsqueeze.default, flat, -1, like=like), 1
