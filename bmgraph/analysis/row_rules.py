"""The rules for labels of rows (`row_labels.py`), by how an operator's row says that dimensions belong together.

A rule (node, arguments, keywords, result) gives the labels of the results of a call; a call without a rule mixes
whatever carries a label. `row_runner.py` runs a graph by these rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.row_labels import (
    MIXED,
    NONE,
    SUMMED,
    Labels,
    Size,
    Value,
    added,
    every,
    full,
    join,
    leaves,
    like,
    plain,
    reduce,
    some,
)  # fmt: skip
from bmgraph.ops.trait_row import Dims, Kind
from bmgraph.ops.traits import calls, is_tagged_pointwise, place_of, traits_of

aten = torch.ops.aten


def _of(item: Any) -> Labels:
    if isinstance(item, Value):
        return item.labels
    return full((), MIXED if isinstance(item, Size) and item.of_rows else NONE)


def _all(item: Any) -> Labels:
    """One label for all elements of a value together."""
    labels = _of(item)
    return reduce(labels, range(labels.dim())).reshape(())


def _joined(items: list[Any]) -> Labels:
    """One label for all that is given besides the first operand, such as weights."""
    return join(full((), NONE), *[_all(item) for item in items if isinstance(item, Value)])


def pointwise(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Labels:
    """Operands that broadcast. A sum over rows stays one under what is linear in it."""
    operands = [_of(item) for item in leaves((args, kwargs)) if isinstance(item, (Value, Size))]
    if not any(some(item, SUMMED) for item in operands):
        return join(*operands)
    stays = _is_linear(node, args, kwargs, operands, result)
    return join(*operands) if stays else full(result.shape, MIXED)


def _is_linear(node: fx.Node, args: Any, kwargs: Any, operands: list[Labels], result: torch.Tensor) -> bool:
    """Whether the result is a sum over rows wherever the operands are."""
    row, summed = traits_of(node), [every(item, SUMMED) for item in operands]
    free = [every(item, NONE) for item in operands]
    numbers = [item for item in args[:2] if isinstance(item, (int, float)) and not isinstance(item, bool)]
    if row.linear:
        return len(operands) == 1 and (result.is_floating_point() or not args[0].tensor.is_floating_point())
    if row.kind in (Kind.SUM, Kind.DIFFERENCE):
        return all(summed) and all(number == 0 for number in numbers)
    if row.kind is Kind.SCALING:
        return sum(summed) == 1 and sum(free) == len(operands) - 1
    if row.kind is Kind.QUOTIENT:
        return isinstance(args[0], Value) and summed[0] and all(free[1:]) and not kwargs
    return False


def _moved(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Any:
    if calls(node, aten.view, aten._unsafe_view):  # labels are not laid out as the value is
        return args[0].labels.reshape(plain(args[1], _of))
    target: Any = node.target
    return target(*plain(args, _of), **plain(kwargs, _of))


def _padded(node: fx.Node, args: Any, kwargs: Any, result: torch.Tensor) -> Labels:
    """(x, widths, ...): what is added belongs to the rows beside it."""
    labels, widths = args[0].labels, plain(args[1], _of)
    dims = {labels.dim() - 1 - place // 2 for place, width in enumerate(widths) if width}
    inside = torch.nn.functional.pad(labels.contiguous(), widths)
    beside = reduce(labels, sorted(dims))
    return torch.where(inside == NONE, beside, inside)


def _indexed(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Labels:
    """index(x, [index, ...]): where the numbers of an index are not known, it may be any."""
    labels, picked = args[0].labels, []
    for dim, index in enumerate(args[1]):
        if index is not None and not index.known:
            labels = reduce(labels, (dim,)).expand(labels.shape)
        unknown = None if index is None else torch.zeros(index.tensor.shape, dtype=torch.int64)
        picked.append(index.tensor if index is not None and index.known else unknown)
    indices = [index.labels for index in args[1] if index is not None]
    moved = labels[tuple(slice(None) if item is None else item for item in picked)]
    found = join(*indices)
    places = [dim for dim, index in enumerate(args[1]) if index is not None]
    first = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    trailing = moved.dim() - first - found.dim()
    return join(moved, found.reshape([*found.shape, *[1] * trailing]))


def _gathered(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Labels:
    """gather(x, dim, index), and index_select with an index of one dimension."""
    x, dim, index = args[:3]
    labels = x.labels if index.known else reduce(x.labels, (dim,)).expand(x.labels.shape)
    places = index.tensor if index.known else torch.zeros(index.tensor.shape, dtype=torch.int64)
    if traits_of(node).dims is Dims.GATHER:
        return join(torch.gather(labels, dim, places), index.labels)
    view = [-1 if axis == dim % labels.dim() else 1 for axis in range(labels.dim())]
    return join(torch.index_select(labels, dim, places), index.labels.reshape(view))


def _scattered(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Labels:
    """scatter(x, dim, index, source): any element of the source may come anywhere along `dim`."""
    x, dim, index, source = args[:4]
    if any(
        a != b
        for axis, (a, b) in enumerate(zip(x.tensor.shape, index.tensor.shape))
        if axis != dim % len(x.tensor.shape)
    ):
        raise ValueError("a scatter to some of the rows")
    given = [item.labels for item in (index, source) if isinstance(item, Value)]
    found = join(*[reduce(item, (dim,)) for item in (x.labels, *given)])
    return found.expand(result.shape)


def _embedding(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Labels:
    table, ids = args[:2]
    return join(ids.labels.unsqueeze(-1), _all(table)).expand(result.shape)


def _one_hot(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Labels:
    labels: Labels = args[0].labels
    return labels.unsqueeze(-1).expand(result.shape)


def _linear(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Labels:
    """linear(x[..., in], weight, bias)."""
    return join(reduce(args[0].labels, (-1,)), _joined(args[1:])).expand(result.shape)


def _matmul(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Labels:
    """Products of matrices and vectors; what is added comes first."""
    *more, a, b = [item for item in args if isinstance(item, Value)]
    left = reduce(a.labels, (-1,))
    right = reduce(b.labels, (-2 if b.labels.dim() > 1 else -1,))
    if b.labels.dim() == 1:
        left, right = left.squeeze(-1), right.squeeze(-1)
    elif a.labels.dim() == 1:
        left, right = left.squeeze(-1), right.squeeze(-2)
    return join(left, right, *[_of(item) for item in more]).expand(result.shape)


def _attention(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Labels:
    """q[..., s, d], k[..., t, d], v[..., t, e], mask[..., s, t] -> [..., s, e]."""
    q, k, v = args[:3]
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    found = [reduce(q.labels, (-1,)), reduce(k.labels, (-2, -1)), reduce(v.labels, (-2, -1))]
    if q.labels.dim() > 2 and q.labels.shape[-3] != k.labels.shape[-3]:
        found[1:] = [reduce(item, (-3,)) for item in found[1:]]  # heads that share keys and values
    return join(*found, *([reduce(mask.labels, (-1,))] if isinstance(mask, Value) else [])).expand(
        result.shape
    )


def _experts(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Labels:
    """x[..., I] or x[..., K, I], and somewhere ids[..., K] -> [..., K, O]."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, args)), **kwargs}
    x, ids = given.pop("x"), given.pop("ids")
    entering = reduce(x.labels, (-1,))
    entering = entering if x.labels.dim() > ids.labels.dim() else entering.unsqueeze(-2)
    return join(entering, ids.labels.unsqueeze(-1), _joined(list(given.values()))).expand(result.shape)


def _weighted(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Labels:
    """(x, weights, ...): weights are those of an axis."""
    return join(args[0].labels, _joined(args[1:]))


def _along(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Any:
    """(x, dim, ...): every element needs all along `dim`."""
    return _on_dim(args[0], args[1] if len(args) > 1 else kwargs.get("dim", -1), result)


def _selected(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Any:
    """(x, how many, dim, ...): as along a dimension."""
    return _on_dim(args[0], args[2] if len(args) > 2 else kwargs.get("dim", -1), result)


def _on_dim(x: Value, dim: int, result: Any) -> Any:
    labels = reduce(x.labels, (dim,))
    if isinstance(result, torch.Tensor):
        return labels.expand(result.shape)
    return [labels.expand(item.shape) for item in result]


def _normed(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Any:
    """(x, normalized_shape, weight, bias, ...)."""
    x, shape = args[:2]
    labels = join(reduce(x.labels, range(-len(shape), 0)), _joined(args[2:]))
    if isinstance(result, torch.Tensor):
        return labels.expand(result.shape)
    return [labels.expand(result[0].shape), *[labels] * (len(result) - 1)]


def _per_item(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Any:
    """(x[N, ...], ...): each item of axis 0 by itself."""
    x = args[0].labels
    spatial = traits_of(node).spatial
    is_one_item = spatial > 0 and x.dim() == spatial + 1
    found = join(reduce(x, range(0 if is_one_item else 1, x.dim())), _joined(args[1:]))
    parts = [result] if isinstance(result, torch.Tensor) else result
    made = [found.reshape([-1, *[1] * (part.dim() - 1)]).expand(part.shape) for part in parts]
    return made[0] if isinstance(result, torch.Tensor) else made


def _in_blocks(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Labels:
    """(x, block): blocks along the last dimension."""
    return reduce(args[0].labels, (-1,)).expand(result.shape)


def _banded(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Labels:
    """What is kept depends on the place in the last two dimensions."""
    return reduce(args[0].labels, (-2, -1)).expand(result.shape)


def _batch_norm(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Any:
    """The statistics are those of each rank's rows: rows do not count as meeting in them."""
    found = join(args[0].labels, _joined(args[1:3]))
    return found if isinstance(result, torch.Tensor) else [found, *like(result[1:], NONE)]


def _dims(args: Any, kwargs: Any, rank: int) -> tuple[list[int], bool]:
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    if dims is None or dims == []:
        dims = list(range(rank))
    return [dim % max(rank, 1) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])], bool(keep)


def _vector_norm(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Any:
    """(x, order, dims, keepdim)"""
    return _reduced(node, (args[0], *args[2:]), kwargs, result)


def _reduced(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Any:
    """(x, dims, keepdim): sums that ranks can add stay known as such, all other reductions mix what they meet."""
    if len(args) > 1 and isinstance(args[1], Value):
        return pointwise(node, args, kwargs, result)  # the larger of two
    labels = args[0].labels
    dims, keep = _dims(args, kwargs, labels.dim())
    if labels.dim() == 0:
        return like(result, int(labels))
    found = added(labels, dims) if traits_of(node).adds else reduce(labels, dims)
    if not keep:
        found = found.reshape([size for axis, size in enumerate(found.shape) if axis not in dims])
    return found if isinstance(result, torch.Tensor) else [found] * len(result)


def _loss(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Any:
    """(input, target, ...): over classes along dimension 1, if the target has none, and then as `reduction` says."""
    x, target = args[0].labels, args[1].labels
    if x.dim() == target.dim() + 1:
        x = reduce(x, (min(1, x.dim() - 1),)).squeeze(min(1, x.dim() - 1))
    elif place_of(node.target, "label_smoothing") is not None:  # the target may be probabilities of classes
        x, target = (
            reduce(item, (min(1, item.dim() - 1),)).squeeze(min(1, item.dim() - 1)) for item in (x, target)
        )
    elementwise = traits_of(node).dims is Dims.ELEMENTWISE_LOSS
    weights = [item for item in args[2:] if isinstance(item, Value)]
    terms = join(x, target, *[item.labels if elementwise else _all(item) for item in weights])
    first = result if isinstance(result, torch.Tensor) else result[0]
    place = place_of(node.target, "reduction")
    assert place is not None
    reduction = args[place] if len(args) > place else kwargs.get("reduction", 1)
    if first.dim() == 0 and terms.dim():
        dims = list(range(terms.dim()))
        terms = (added if reduction == 2 else reduce)(terms, dims).reshape(())
    return terms if isinstance(result, torch.Tensor) else [terms, *like(result[1:], MIXED)]


REARRANGED = frozenset({Dims.MOVED, Dims.PERMUTED, Dims.EXPANDED})
"""Calls that only put elements elsewhere: a sum over rows stays one."""
SIZES_ONLY = frozenset({Dims.SIZES_ALONE, Dims.NEW})
"""Calls (x, ...) that read the sizes or the dtype of x alone."""
CONSTANTS = SIZES_ONLY | {Dims.CREATED}
"""Calls whose result is the same everywhere, or random."""
STATISTICS = frozenset({Dims.BATCH, Dims.RANGE})
"""Calls whose statistics ranks take of their own rows: rows do not count as meeting in them, and it is reported."""

Rule = Callable[[fx.Node, Any, Any, Any], Any]

RULES: dict[Dims, Rule] = {
    **dict.fromkeys((*REARRANGED, Dims.INSERTED), _moved),
    **dict.fromkeys((Dims.MATMUL, Dims.ADDED_MATMUL), _matmul),
    **dict.fromkeys((Dims.ALONG, Dims.ALONG_PARTS), _along),
    Dims.SELECTED: _selected,
    Dims.NORMED: _normed,
    **dict.fromkeys(STATISTICS, _batch_norm),
    Dims.REDUCED: _reduced,
    **dict.fromkeys((Dims.CLASS_LOSS, Dims.ELEMENTWISE_LOSS), _loss),
    Dims.PER_ITEM: _per_item,
    Dims.BANDED: _banded,
    Dims.PADDED: _padded,
    **dict.fromkeys((Dims.GATHER, Dims.INDEX_SELECT), _gathered),
    Dims.SCATTER: _scattered,
    Dims.EXPERTS: _experts,
    Dims.LINEAR: _linear,
    Dims.ONE_HOT: _one_hot,
    Dims.VECTOR_NORM: _vector_norm,
    Dims.ATTENTION: _attention,
    **dict.fromkeys((Dims.PER_CHANNEL, Dims.WEIGHTED), _weighted),
    Dims.BLOCKS: _in_blocks,
    Dims.EMBEDDING: _embedding,
    Dims.INDEX: _indexed,
    Dims.ELEMENTWISE: pointwise,
}
"""How dimensions belong together -> the labels of a call's results."""


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of a call, None if there is none."""
    return RULES.get(traits_of(node).dims) or (pointwise if is_tagged_pointwise(node) else None)


def keeps_sums(node: fx.Node) -> bool:
    """Whether a sum over rows stays one under a call of one operand that is not pointwise."""
    return traits_of(node).dims in REARRANGED or traits_of(node).linear
