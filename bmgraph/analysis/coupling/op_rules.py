"""Which dimensions of operands and output a call couples, index by index, by how its operator's row says they belong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.value_origins import SCALARS
from bmgraph.ops.trait_row import Dims, Kind
from bmgraph.ops.traits import argument, is_tagged_pointwise, traits_of

DimRef = tuple[fx.Node, int]
"""One dimension of a node's tensor: (node, dimension)."""

Pair = tuple[DimRef, DimRef]
"""Two coupled dimensions: an index removed from one must be removed from the other."""

WHOLE = -1
"""In place of a dimension: the operator needs all indices of the paired one, so none can be removed."""


def coupled_pairs(node: fx.Node) -> list[Pair]:
    """The dimensions that a call couples. An unknown operator pairs every dimension of its operands and of
    its output with WHOLE.

    Movements other than permutations are handled by index tracing: what they couple depends on sizes.
    """
    if node.op == "output":
        return [pair for item in node.all_input_nodes for pair in _whole(item, node)]
    if node.op != "call_function" or isinstance(node.meta.get("val"), SCALARS):
        return []
    row = traits_of(node)
    if row.kind is Kind.SPLIT:
        return []
    rule = KINDS.get(row.kind) or RULES.get(row.dims)
    if rule is None and is_tagged_pointwise(node):
        rule = _elementwise
    return _all_whole(node) if rule is None or not rank(node) else rule(node, node.args)


def rank(node: fx.Node) -> int:
    """Number of dimensions of a node's tensor; 0 if its value is not a tensor."""
    fake = node.meta.get("val")
    return fake.dim() if isinstance(fake, torch.Tensor) else 0


def _aligned(item: fx.Node, node: fx.Node, drop: int = 0) -> list[Pair]:
    """Pairs the dimensions of an operand with those of the output, from the right, without the last `drop`."""
    mine, out = rank(item), rank(node)
    return [((item, mine - back), (node, out - back)) for back in range(1 + drop, min(mine, out) + 1)]


def _whole(item: fx.Node, node: fx.Node) -> list[Pair]:
    return [((item, dim), (node, WHOLE)) for dim in range(rank(item))]


def _all_whole(node: fx.Node) -> list[Pair]:
    """Nothing can be removed from any operand, nor from the output: it is not known what it depends on."""
    return [pair for item in (*node.all_input_nodes, node) for pair in _whole(item, node)]


def _elementwise(node: fx.Node, args: Any) -> list[Pair]:
    """Operands that broadcast. Also for norms, whose weight aligns with the last dimensions."""
    return [pair for item in node.all_input_nodes for pair in _aligned(item, node)]


def _permuted(node: fx.Node, args: Any) -> list[Pair]:
    """Finds the new order of dimensions by running the call on a tensor whose sizes are all distinct."""
    target: Any = node.target
    probe = torch.empty(list(range(2, 2 + rank(args[0]))), device="meta")
    return [((args[0], size - 2), (node, axis)) for axis, size in enumerate(target(probe, *args[1:]).shape)]


def _linear(node: fx.Node, args: Any) -> list[Pair]:
    """linear(x[..., in], w[out, in], b[out]) -> [..., out]."""
    x, weight, *rest = args
    last = rank(node) - 1
    found = [*_aligned(x, node, drop=1), ((x, rank(x) - 1), (weight, 1)), ((weight, 0), (node, last))]
    return found + [((bias, 0), (node, last)) for bias in rest if isinstance(bias, fx.Node)]


def _matmul(node: fx.Node, args: Any) -> list[Pair]:
    """a[..., m, k] @ b[..., k, n] -> [..., m, n]."""
    a, b = args[:2]
    if rank(a) < 2 or rank(b) < 2:
        return _all_whole(node)
    last = rank(node) - 1
    return [
        *_aligned(a, node, drop=2),
        *_aligned(b, node, drop=2),
        ((a, rank(a) - 2), (node, last - 1)),
        ((b, rank(b) - 1), (node, last)),
        ((a, rank(a) - 1), (b, rank(b) - 2)),
    ]


def _baddbmm(node: fx.Node, args: Any) -> list[Pair]:
    """baddbmm(added, a, b) = added + a @ b."""
    return _aligned(args[0], node) + _matmul(node, args[1:3])


def _attention(node: fx.Node, args: Any) -> list[Pair]:
    """q[..., s, d], k[..., t, d], v[..., t, e], mask[..., s, t] -> [..., s, e]."""
    q, k, v = args[:3]
    mask = args[3] if len(args) > 3 else node.kwargs.get("attn_mask")
    last = rank(node) - 1
    if any(rank(item) > 2 and not _sizes_fit(item, node) for item in (q, k, v)):
        return _all_whole(node)  # heads of keys stand for several of queries (enable_gqa)
    found = [pair for item in (q, k, v) for pair in _aligned(item, node, drop=2)]
    found += [((q, last - 1), (node, last - 1)), ((v, last), (node, last))]
    found += [((q, last), (k, last)), ((k, last - 1), (v, last - 1))]
    if isinstance(mask, fx.Node):
        found += _aligned(mask, node, drop=2)
        found += [((mask, rank(mask) - 1), (k, last - 1)), ((mask, rank(mask) - 2), (q, last - 1))]
    return found


def _convolution(node: fx.Node, args: Any) -> list[Pair]:
    """x[N, C, ...], weight[O, C, ...], bias[O] -> [N, O, ...]; with groups, or without N, all channels are needed."""
    x, weight = args[:2]
    bias = argument(node, "bias")
    places = range(2, rank(node))
    if not traits_of(node).spatial or argument(node, "groups", 1) != 1 or rank(x) != rank(weight):
        return _all_whole(node)
    found = [((x, 0), (node, 0)), ((x, 1), (weight, 1)), ((weight, 0), (node, 1))]
    found += [((item, dim), (node, WHOLE)) for item in (x, weight, node) for dim in places]
    return found + ([((bias, 0), (node, 1))] if isinstance(bias, fx.Node) else [])


def _experts(node: fx.Node, args: Any) -> list[Pair]:
    """x[..., in], weight[experts, out, in], ids[..., K], bias[experts, out] -> [..., K, out]."""
    x, weight, ids = args[:3]
    bias = argument(node, "bias")
    last = rank(node) - 1
    found = [((x, rank(x) - 1), (weight, 2)), ((weight, 1), (node, last)), ((weight, 0), (node, WHOLE))]
    found += [((item, dim), (node, WHOLE)) for item in (x, node) for dim in range(rank(item) - 1)]
    found += _whole(ids, node)
    return found + (
        [((bias, 1), (node, last)), ((bias, 0), (node, WHOLE))] if isinstance(bias, fx.Node) else []
    )


def _reduced(node: fx.Node, args: Any) -> list[Pair]:
    """(x, dims, keepdim): needs all of these dimensions; the others stay."""
    x, dims = args[0], argument(node, "dim")
    if dims is None or dims == []:
        return _all_whole(node)
    gone = {int(dim) % rank(x) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
    keeps = bool(argument(node, "keepdim", False))
    left = [dim for dim in range(rank(x)) if keeps or dim not in gone]
    pairs = [((x, dim), (node, place)) for place, dim in enumerate(left) if dim not in gone]
    return pairs + [((x, dim), (node, WHOLE)) for dim in gone]


def _sizes_fit(item: fx.Node, node: fx.Node) -> bool:
    """Whether the heads of an operand of an attention are those of its result, or one for all."""
    mine, out = item.meta["val"].shape[-3], node.meta["val"].shape[-3]
    return not (isinstance(mine, int) and isinstance(out, int)) or mine in (1, out)


def _embedding(node: fx.Node, args: Any) -> list[Pair]:
    """table[rows, features] looked up at ids[...] -> [..., features]."""
    table, ids = args[:2]
    found = [((table, 0), (node, WHOLE)), ((table, 1), (node, rank(node) - 1))]
    return found + [((ids, dim), (node, dim)) for dim in range(rank(ids))]


def _dequantize(node: fx.Node, args: Any) -> list[Pair]:
    """codes[...], scale[n] and axis: one scale per index of that axis."""
    codes, scale, axis = args[:3]
    return [*_aligned(codes, node), ((scale, 0), (node, axis))]


def _along_dim(node: fx.Node, args: Any) -> list[Pair]:
    """(x, dim, ...): needs all of `dim`."""
    x, dim = args[:2]
    whole = dim % rank(node)
    kept = [((x, axis), (node, WHOLE if axis == whole else axis)) for axis in range(rank(node))]
    return [*kept, ((node, whole), (node, WHOLE))]


KINDS: dict[Kind, Callable[[fx.Node, Any], list[Pair]]] = {
    Kind.CONVOLUTION: _convolution,
    Kind.EXPERTS: _experts,
}
"""Kind of a call -> the pairs that it couples, where that says more than how its dimensions belong together."""

RULES: dict[Dims, Callable[[fx.Node, Any], list[Pair]]] = {
    Dims.LINEAR: _linear,
    Dims.MATMUL: _matmul,
    Dims.ADDED_MATMUL: _baddbmm,
    Dims.EMBEDDING: _embedding,
    Dims.PER_CHANNEL: _dequantize,
    Dims.PERMUTED: _permuted,
    Dims.ATTENTION: _attention,
    Dims.ALONG: _along_dim,
    Dims.REDUCED: _reduced,
    **dict.fromkeys((Dims.ELEMENTWISE, Dims.RANGE, Dims.BLOCKS, Dims.NORMED, Dims.SIZES_ALONE), _elementwise),
}
"""How dimensions belong together -> the pairs that a call couples; others need all indices of all dimensions."""
