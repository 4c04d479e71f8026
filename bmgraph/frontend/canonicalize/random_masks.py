"""Fold dropout that is written out (a random mask of zeros and ones, a product, a scale) into one dropout node."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers dropout_along)
from bmgraph.ir.editor import Editor
from bmgraph.ir.matching import call, equal_sizes, only_user, through

aten = torch.ops.aten

UNIFORM = (aten.rand.default, aten.rand_like.default)
"""Draws between 0 and 1."""

DRAWS = (*UNIFORM, aten.bernoulli.p, aten.bernoulli.default)

CASTS = (aten.to.dtype,)

TOLERANCE = 1e-6
"""Largest relative difference of a scale from 1 / (the probability that an element is kept)."""


def fold_random_masks(editor: Editor) -> None:
    """Fold every `x * mask / keep` into `bmgraph::dropout_along`, where `mask` is 1 with probability `keep`, else 0.

    The mask may have size 1 along any axis: it is drawn once for all elements there, such as once a row (drop path,
    stochastic depth). A mask that is not scaled by 1 / keep stays, and one that something else reads, too.
    """
    for node in list(editor.graph.nodes):
        if node.target is aten.mul.Tensor:
            _fold(editor, node)


def _fold(editor: Editor, product: fx.Node) -> None:
    for value, mask in (product.args, product.args[::-1]):
        scale, drawn = _unscaled(mask)
        keep = _probability(drawn)
        if keep is None or not isinstance(value, fx.Node) or not _read_once(mask):
            continue
        last = product
        if not _is_inverse(scale, keep):
            inner, source = _unscaled(value)
            after = only_user(product)
            outer = _unscaled(after)[0] if _scales(after) else 1.0
            if _is_inverse(scale * inner, keep):
                value = source
            elif _is_inverse(scale * outer, keep):
                assert after is not None
                last = after
            else:
                continue
        dims = _drawn_dims(mask, value)
        if dims is None or value.meta["val"].dtype != last.meta["val"].dtype:
            continue
        operator = torch.ops.bmgraph.dropout_along.default
        editor.replace(last, editor.call(operator, value, 1 - keep, True, dims, like=last))
        return


def _read_once(node: Any) -> bool:
    """Whether a mask and each value that it is made from, back to the draw, has one reader."""
    while only_user(node) is not None:
        if node.target in DRAWS:
            return True
        node = node.args[0]
    return False


def _probability(node: Any) -> float | None:
    """The probability with which a random mask is 1; None for a value that is no such mask."""
    node = through(node, *CASTS)
    if (floor := call(node, aten.floor.default)) is not None:
        total = call(floor.args[0], aten.add.Tensor)
        return _within(total.args[1]) if total is not None and call(total.args[0], *UNIFORM) else None
    if (drawn := call(node, aten.bernoulli.p)) is not None:
        return _within(drawn.args[1])
    if (drawn := call(node, aten.bernoulli.default)) is not None:
        full = call(drawn.args[0], aten.full.default, aten.full_like.default, aten.new_full.default)
        return _within(full.args[-1]) if full is not None else None
    if (below := call(node, aten.lt.Scalar, aten.le.Scalar)) is not None and call(below.args[0], *UNIFORM):
        return _within(below.args[1])
    if (above := call(node, aten.gt.Scalar, aten.ge.Scalar)) is not None and call(above.args[0], *UNIFORM):
        dropped = _within(above.args[1], low=0.0, high=1.0)
        return None if dropped is None else _within(1 - dropped)
    return None


def _within(value: Any, low: float = 1e-6, high: float = 1.0) -> float | None:
    return float(value) if isinstance(value, (int, float)) and low <= value <= high else None


def _scales(node: fx.Node | None) -> bool:
    """Whether a call multiplies or divides by a number that is not 0."""
    found = call(node, aten.mul.Tensor, aten.div.Tensor)
    return found is not None and isinstance(found.args[1], (int, float)) and found.args[1] != 0


def _unscaled(node: Any) -> tuple[float, Any]:
    """The number by which a value is multiplied, and the value before that."""
    node = through(node, *CASTS) if _probability(node) is None else node
    if not _scales(node):
        return 1.0, node
    number = float(node.args[1])
    return (number if node.target is aten.mul.Tensor else 1 / number), node.args[0]


def _is_inverse(scale: float, keep: float) -> bool:
    return abs(scale * keep - 1) <= TOLERANCE


def _drawn_dims(mask: Any, value: fx.Node) -> list[int] | None:
    """The axes of `value` along which the mask has a draw for each index; None if the mask enlarges the value."""
    drawn, whole = mask.meta["val"].shape, value.meta["val"].shape
    if len(drawn) > len(whole):
        return None
    dims = []
    for axis, size in enumerate(drawn, len(whole) - len(drawn)):
        if isinstance(size, int) and size == 1:
            continue
        if not equal_sizes(size, whole[axis]):
            return None
        dims.append(axis)
    return dims
