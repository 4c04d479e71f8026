"""Which dimensions an operator ties: index by index, so that what is taken out of one has to go from the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.value_origins import (
    ATTENTIONS,
    CASTS,
    CUTS,
    DROPOUTS,
    ROUNDINGS,
    SIZES,
    SOFTMAXES,
    stem,
)

Place = tuple[fx.Node, int]
"""A dimension of a node's tensor."""

Tie = tuple[Place, Place]

WHOLE = -1
"""Stands for a dimension where an operator needs all of what it reads: nothing can be taken out."""

ELEMENTWISE = DROPOUTS | CASTS | ROUNDINGS | frozenset({"clone", "contiguous", "masked_fill", "where"})
"""Calls that keep every index in its place although they may not be tagged as pointwise."""

LIKE = frozenset({"full_like", "zeros_like", "ones_like", "empty_like"})
"""Calls that take nothing but the sizes."""

TURNS = frozenset({"t", "transpose", "permute"})
"""Calls that only put dimensions in another order."""

ALONG = SOFTMAXES | frozenset({"log_softmax", "cumsum"})
"""Calls (x, dim, ...) that need the whole of one dimension and keep the others."""


def ties(node: fx.Node) -> list[Tie]:
    """The dimensions that a call ties; for a call of an unknown kind, all of its operands' with WHOLE.

    Movements other than turns are no business of this function: what they tie depends on their sizes.
    """
    if node.op == "output":
        return [tie for item in node.all_input_nodes for tie in _whole(item, node)]
    if node.op != "call_function" or isinstance(node.meta.get("val"), SIZES) or stem(node) in CUTS:
        return []
    rule = RULES.get(stem(node))
    if rule is not None:
        return rule(node, node.args)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _elementwise(node, node.args)
    return [tie for item in node.all_input_nodes for tie in _whole(item, node)]


def rank(node: fx.Node) -> int:
    """How many dimensions a node's tensor has; 0 where it is none."""
    fake = node.meta.get("val")
    return fake.dim() if isinstance(fake, torch.Tensor) else 0


def _aligned(item: fx.Node, node: fx.Node, drop: int = 0) -> list[Tie]:
    """The dimensions of an operand under those of the output, from the right, but for the last `drop`."""
    mine, out = rank(item), rank(node)
    return [((item, mine - back), (node, out - back)) for back in range(1 + drop, min(mine, out) + 1)]


def _whole(item: fx.Node, node: fx.Node) -> list[Tie]:
    return [((item, dim), (node, WHOLE)) for dim in range(rank(item))]


def _elementwise(node: fx.Node, args: Any) -> list[Tie]:
    """Any number of operands that broadcast; the same ties hold for a norm and its weight, over the last dimensions."""
    return [tie for item in node.all_input_nodes for tie in _aligned(item, node)]


def _turned(node: fx.Node, args: Any) -> list[Tie]:
    """The order of dimensions is read from what becomes of a tensor of distinct sizes."""
    target: Any = node.target
    probe = torch.empty(list(range(2, 2 + rank(args[0]))), device="meta")
    return [((args[0], size - 2), (node, axis)) for axis, size in enumerate(target(probe, *args[1:]).shape)]


def _linear(node: fx.Node, args: Any) -> list[Tie]:
    """linear(x[..., in], w[out, in], b[out])."""
    x, weight, *rest = args
    last = rank(node) - 1
    found = [*_aligned(x, node, drop=1), ((x, rank(x) - 1), (weight, 1)), ((weight, 0), (node, last))]
    return found + [((bias, 0), (node, last)) for bias in rest if isinstance(bias, fx.Node)]


def _matmul(node: fx.Node, args: Any) -> list[Tie]:
    """a[..., m, k] @ b[..., k, n]."""
    a, b = args[:2]
    if rank(a) < 2 or rank(b) < 2:
        return _whole(a, node) + _whole(b, node)
    last = rank(node) - 1
    return [
        *_aligned(a, node, drop=2),
        *_aligned(b, node, drop=2),
        ((a, rank(a) - 2), (node, last - 1)),
        ((b, rank(b) - 1), (node, last)),
        ((a, rank(a) - 1), (b, rank(b) - 2)),
    ]


def _baddbmm(node: fx.Node, args: Any) -> list[Tie]:
    """added + a @ b."""
    return _aligned(args[0], node) + _matmul(node, args[1:3])


def _attention(node: fx.Node, args: Any) -> list[Tie]:
    """q[..., s, d], k[..., t, d], v[..., t, e], mask[..., s, t] -> [..., s, e]."""
    q, k, v = args[:3]
    mask = args[3] if len(args) > 3 else node.kwargs.get("attn_mask")
    last = rank(node) - 1
    found = [tie for item in (q, k, v) for tie in _aligned(item, node, drop=2)]
    found += [((q, last - 1), (node, last - 1)), ((v, last), (node, last))]
    found += [((q, last), (k, last)), ((k, last - 1), (v, last - 1))]
    if isinstance(mask, fx.Node):
        found += _aligned(mask, node, drop=2)
        found += [((mask, rank(mask) - 1), (k, last - 1)), ((mask, rank(mask) - 2), (q, last - 1))]
    return found


def _embedding(node: fx.Node, args: Any) -> list[Tie]:
    """table[rows, features] looked up at ids[...]."""
    table, ids = args[:2]
    found = [((table, 0), (node, WHOLE)), ((table, 1), (node, rank(node) - 1))]
    return found + [((ids, dim), (node, dim)) for dim in range(rank(ids))]


def _dequantize(node: fx.Node, args: Any) -> list[Tie]:
    """codes[...] and scale[n], one for each index of a dimension."""
    codes, scale, axis = args[:3]
    return [*_aligned(codes, node), ((scale, 0), (node, axis))]


def _along(node: fx.Node, args: Any) -> list[Tie]:
    x, dim = args[:2]
    whole = dim % rank(node)
    return [((x, axis), (node, WHOLE if axis == whole else axis)) for axis in range(rank(node))]


RULES: dict[str, Callable[[fx.Node, Any], list[Tie]]] = {
    "linear": _linear,
    "matmul": _matmul,
    "bmm": _matmul,
    "mm": _matmul,
    "baddbmm": _baddbmm,
    "layer_norm": _elementwise,
    "rms_norm": _elementwise,
    "embedding": _embedding,
    "dequantize": _dequantize,
    **dict.fromkeys(TURNS, _turned),
    **dict.fromkeys(ATTENTIONS, _attention),
    **dict.fromkeys(ALONG, _along),
    **dict.fromkeys(ELEMENTWISE | LIKE, _elementwise),
}
"""Operator -> the dimensions that it ties."""
