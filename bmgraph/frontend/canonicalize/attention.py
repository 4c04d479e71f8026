"""Fold attention that is written out (matmul, scale, mask, softmax, matmul) into `scaled_dot_product_attention`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from bmgraph.ir.editor import Editor
from bmgraph.ir.matching import call, equal_sizes, only_user

aten = torch.ops.aten

PRODUCTS = (aten.matmul.default, aten.bmm.default)
SOFTMAXES = (aten.softmax.int, aten._softmax.default)
CASTS = (aten.to.dtype,)
DROPOUT = aten.dropout.default
"""The only kind of dropout that attention has; one that does not act is no longer in the graph."""


@dataclass
class _Scores:
    """The argument of the softmax: `q @ k^T * scale` plus the sum of `bias`."""

    q: fx.Node
    k: fx.Node
    k_is_transposed: bool
    scale: float
    bias: list[tuple[fx.Node, float]] = field(default_factory=list)
    """(term, factor): what is added to the scores, and the factor that it is multiplied by afterwards."""


def fold_attentions(editor: Editor) -> None:
    """Fold every `softmax(q k^T * scale + bias) v` whose attention weights have no other reader."""
    for node in list(editor.graph.nodes):
        if node.target in SOFTMAXES:
            _fold(editor, node)


def expand_shared_heads(editor: Editor) -> None:
    """Expand keys and values of one head to the number of query heads, instead of broadcasting."""
    for node in list(editor.graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default or node.kwargs.get("enable_gqa"):
            continue
        q, *others = node.args[:3]
        shape = q.meta["val"].shape  # type: ignore[union-attr]
        if len(shape) != 4 or not isinstance(shape[1], int) or shape[1] == 1:
            continue
        for position, item in enumerate(others, 1):
            if isinstance(item, fx.Node) and item.meta["val"].dim() == 4 and item.meta["val"].shape[1] == 1:
                node.update_arg(
                    position, editor.call(aten.expand.default, item, [-1, shape[1], -1, -1], like=node)
                )


def _fold(editor: Editor, softmax: fx.Node) -> None:
    rank = softmax.meta["val"].dim()
    if softmax.args[1] % rank != rank - 1 or rank not in (3, 4):  # type: ignore[operator]
        return
    weights, dropout = softmax, 0.0
    while (user := only_user(weights)) is not None and (
        user.target in (*CASTS, DROPOUT) or _reshapes_heads(user)
    ):
        if user.target is DROPOUT:
            second = float(user.args[1])  # type: ignore[arg-type]
            dropout = second if dropout == 0.0 else dropout + second - dropout * second
        weights = user
    product = only_user(weights)
    if product is None or product.target not in PRODUCTS or product.args[0] is not weights:
        return
    v = product.args[1]
    scores = _match_scores(softmax.args[0])
    if scores is None or not isinstance(v, fx.Node):
        return
    dtype = product.meta["val"].dtype
    q, k = scores.q, scores.k
    if any(item.meta["val"].dtype != dtype for item in (q, k, v)):
        return
    flat = {item.meta["val"].dim() for item in (q, k, v)}
    if flat == {3} and rank == 4:
        heads = softmax.meta["val"].shape[1]
        if not isinstance(heads, int):
            return
        q, k, v = (_split_heads(editor, item, heads, softmax) for item in (q, k, v))
        scores.bias = [
            (_split_heads(editor, bias, heads, softmax) if bias.meta["val"].dim() == 3 else bias, factor)
            for bias, factor in scores.bias
        ]
    elif flat != {rank}:
        return
    if scores.k_is_transposed:
        k = editor.call(aten.transpose.int, k, -1, -2, like=softmax)
    mask = None
    for bias, factor in scores.bias:
        term = bias if factor == 1 else editor.call(aten.mul.Tensor, bias, factor, like=softmax)
        if term.meta["val"].dtype != dtype:
            term = editor.call(aten.to.dtype, term, dtype, like=softmax)
        mask = term if mask is None else editor.call(aten.add.Tensor, mask, term, like=softmax)
    if mask is not None and mask.meta["val"].dim() > rank:
        return
    new = editor.call(
        aten.scaled_dot_product_attention.default, q, k, v, mask, dropout, False,
        scale=scores.scale, like=softmax, before=product,
    )  # fmt: skip
    if product.meta["val"].dim() == 3 and rank == 4:
        new = editor.call(aten.flatten.using_ints, new, 0, 1, like=softmax, before=product)
    editor.replace(product, new)


def _reshapes_heads(node: fx.Node) -> bool:
    """Whether a reshape only merges the batch and head dimensions before the last two, or splits them."""
    if node.target is not aten.reshape.default:
        return False
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    return {len(before), len(after)} == {3, 4} and all(
        equal_sizes(a, b) for a, b in zip(before[-2:], after[-2:])
    )


def _split_heads(editor: Editor, node: fx.Node, heads: int, like: fx.Node) -> fx.Node:
    """[batch * heads, ...] -> [batch, heads, ...]."""
    return editor.call(aten.unflatten.int, node, 0, [-1, heads], like=like)


def _match_scores(node: Any, scale: float = 1.0) -> _Scores | None:
    """The scores that a node computes, or None if it does not match; `scale` is the factor applied after it."""
    if call(node, *CASTS) or (isinstance(node, fx.Node) and _reshapes_heads(node)):
        return _match_scores(node.args[0], scale)
    if (product := call(node, *PRODUCTS)) is not None and only_user(product) is not None:
        q, key = product.args
        if not isinstance(q, fx.Node) or not isinstance(key, fx.Node) or key.op != "call_function":
            return None
        if _transposes_last_dims(key):
            return _Scores(q, key.args[0], False, scale)  # type: ignore[arg-type]
        return _Scores(q, key, True, scale)
    if call(node, aten.mul.Tensor, aten.div.Tensor) and isinstance(node.args[1], (int, float)):
        factor = float(node.args[1])
        return _match_scores(node.args[0], scale * (factor if node.target is aten.mul.Tensor else 1 / factor))
    if call(node, aten.add.Tensor) and not node.kwargs:
        for scores, bias in (node.args, node.args[::-1]):
            if not isinstance(bias, fx.Node):
                continue
            found = _match_scores(scores, scale)
            if found is not None:
                found.bias.append((bias, scale))
                return found
    if call(node, aten.baddbmm.default):
        beta, alpha = float(node.kwargs.get("beta", 1)), float(node.kwargs.get("alpha", 1))
        bias, q, key = node.args
        if beta == 0 or not _transposes_last_dims(key):
            inner, transposed = key, True
        else:
            inner, transposed = key.args[0], False
        found = _Scores(q, inner, transposed, scale * alpha)
        if beta != 0:
            found.bias.append((bias, scale * beta))
        return found
    return None


def _transposes_last_dims(node: Any) -> bool:
    """Whether a call swaps the last two dimensions and keeps the others."""
    if (swapped := call(node, aten.transpose.int)) is not None:
        rank = swapped.meta["val"].dim()
        return {axis % rank for axis in swapped.args[1:3]} == {rank - 1, rank - 2}  # type: ignore[operator]
    if (permuted := call(node, aten.permute.default)) is not None:
        axes = [axis % len(permuted.args[1]) for axis in permuted.args[1]]  # type: ignore[union-attr,operator,arg-type]
        rank = len(axes)
        return axes == [*range(rank - 2), rank - 1, rank - 2]
    return False
