"""Fold RMS norms that are written out (square, mean, add, rsqrt, multiply) into `aten.rms_norm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.ir.editor import Editor
from bmgraph.ir.matching import call, only_user, plain_size, through

aten = torch.ops.aten

CASTS = (aten.to.dtype,)


def fold_norms(editor: Editor) -> None:
    """Fold every `x * rsqrt(mean(x^2) + eps) * weight` over the last dimension into one norm node."""
    for node in list(editor.graph.nodes):
        if node.target is aten.rsqrt.default or (
            node.target is aten.reciprocal.default and call(node.args[0], aten.sqrt.default)
        ):
            _fold(editor, node)


def _fold(editor: Editor, root: fx.Node) -> None:
    inside = root.args[0]
    if root.target is aten.reciprocal.default:
        inside = inside.args[0]  # type: ignore[union-attr]
    found = _mean_square(inside)
    if found is None:
        return
    x, eps = found
    scaled = only_user(root)
    if scaled is None or scaled.target is not aten.mul.Tensor:
        return
    other = scaled.args[0] if scaled.args[1] is root else scaled.args[1]
    if through(other, *CASTS) is not through(x, *CASTS):
        return
    source = through(x, *CASTS)
    last, weight = _weighted(scaled)
    dtype = last.meta["val"].dtype
    if source.meta["val"].dtype != dtype:
        source = x if x.meta["val"].dtype == dtype else editor.call(aten.to.dtype, x, dtype, like=last)
    size = plain_size(source.meta["val"].shape[-1])
    if weight is not None and weight.meta["val"].dtype != dtype:
        weight = editor.call(aten.to.dtype, weight, dtype, like=last)
    new = editor.call(aten.rms_norm.default, source, [size], weight, eps, like=scaled, before=last)
    editor.replace(last, new)


def _mean_square(node: Any) -> tuple[fx.Node, float] | None:
    """x and eps of `mean(x^2, -1, keepdim=True) + eps`; None if the node is not that."""
    total = call(node, aten.add.Tensor, aten.add.Scalar)
    if total is None or not isinstance(total.args[1], (int, float)):
        return None
    mean = call(total.args[0], aten.mean.dim)
    if mean is None or len(mean.args) < 3 or mean.args[2] is not True:
        return None
    square = mean.args[0]
    rank = mean.meta["val"].dim()
    if [axis % rank for axis in mean.args[1]] != [rank - 1]:  # type: ignore[union-attr,operator]
        return None
    if (power := call(square, aten.pow.Tensor_Scalar)) is not None and power.args[1] == 2:
        return power.args[0], float(total.args[1])  # type: ignore[return-value]
    if (product := call(square, aten.mul.Tensor)) is not None and product.args[0] is product.args[1]:
        return product.args[0], float(total.args[1])  # type: ignore[return-value]
    if (squared := call(square, aten.square.default)) is not None:
        return squared.args[0], float(total.args[1])  # type: ignore[return-value]
    return None


def _weighted(scaled: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The last node of the norm, and its weight: a vector of the last dimension's size, multiplied after any casts."""
    node = scaled
    while (user := only_user(node)) is not None and user.target in CASTS:
        node = user
    user = only_user(node)
    if user is None or user.target is not aten.mul.Tensor:
        return scaled, None
    other: Any = user.args[0] if user.args[1] is node else user.args[1]
    if not isinstance(other, fx.Node) or not isinstance(other.meta.get("val"), torch.Tensor):
        return scaled, None
    if tuple(other.meta["val"].shape) != tuple(scaled.meta["val"].shape[-1:]):
        return scaled, None
    return user, other
