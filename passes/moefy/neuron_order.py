"""Values of neurons between their two orders: one after the other [T, N], and in groups of which each token has K chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bmgraph.passes.moefy.balanced_kmeans import EMPTY

aten = torch.ops.aten

Call = Callable[..., fx.Node]
"""Makes a call in the graph that is edited."""


def places_of(index: torch.Tensor, count: int) -> torch.Tensor:
    """i64[E, S]: where each neuron of a group stands among `count`; those that fill a group up come after the last."""
    return torch.where(index == EMPTY, count, index)


def in_groups(call: Call, values: fx.Node, places: fx.Node, fills: bool) -> fx.Node:
    """values [T, N], places i64[E, S] -> [T, E, S]; where a neuron only fills its group up (`fills`) it gets 0."""
    leading = values.meta["val"].dim() - 1
    if fills:
        values = call(aten.constant_pad_nd.default, values, [0, 1])
    return call(aten.index.Tensor, values, [None] * leading + [places])


def of_chosen(call: Call, groups: fx.Node, ids: fx.Node) -> fx.Node:
    """groups [T, E, S], ids i64[T, K] -> [T, K, S]."""
    return call(aten.gather.default, groups, -2, _along(call, ids, groups))


def in_line(call: Call, chosen: fx.Node, places: fx.Node, ids: fx.Node, count: int, fills: bool) -> fx.Node:
    """chosen [T, K, S], places i64[E, S], ids i64[T, K] -> [T, count], with 0 for neurons of experts that were not chosen."""
    size = count + fills
    sizes = [-1] * (chosen.meta["val"].dim() - 1) + [size]
    column = call(aten.slice.Tensor, chosen, -1, 0, 1)
    empty = call(aten.zeros_like.default, call(aten.expand.default, column, sizes))
    here = call(aten.index.Tensor, places, [ids])
    line = call(aten.sum.dim_IntList, call(aten.scatter.src, empty, -1, here, chosen), [-2])
    return call(aten.slice.Tensor, line, -1, 0, count) if fills else line


def _along(call: Call, ids: fx.Node, values: fx.Node) -> fx.Node:
    """ids [T, K] as [T, K, S], S being the last size of `values`."""
    sizes: list[Any] = [-1] * ids.meta["val"].dim() + [int(values.meta["val"].shape[-1])]
    return call(aten.expand.default, call(aten.unsqueeze.default, ids, -1), sizes)
