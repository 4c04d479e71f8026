"""Converts neuron values between original order [T, N] and expert groups [T, E, S].

T: tokens, N: neurons, E: experts, S: neurons of an expert, K: experts that a token chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bmgraph.passes.moefy.balanced_kmeans import EMPTY

aten = torch.ops.aten

Call = Callable[..., fx.Node]
"""Adds a call to the graph that is being edited."""


def padded_indices(index: torch.Tensor, count: int) -> torch.Tensor:
    """i64[E, S]: the original index of each neuron of a group; padding gets `count`, one past the last neuron."""
    return torch.where(index == EMPTY, count, index)


def group_neurons(call: Call, values: fx.Node, indices: fx.Node, padded: bool) -> fx.Node:
    """values [T, N], indices i64[E, S] -> [T, E, S]; 0 for padding, which exists if `padded`."""
    leading = values.meta["val"].dim() - 1
    if padded:
        values = call(aten.constant_pad_nd.default, values, [0, 1])
    return call(aten.index.Tensor, values, [None] * leading + [indices])


def gather_chosen(call: Call, groups: fx.Node, ids: fx.Node) -> fx.Node:
    """groups [T, E, S], ids i64[T, K] -> [T, K, S]."""
    return call(aten.gather.default, groups, -2, _expand_ids(call, ids, groups))


def ungroup_neurons(
    call: Call, chosen: fx.Node, indices: fx.Node, ids: fx.Node, count: int, padded: bool
) -> fx.Node:
    """chosen [T, K, S], indices i64[E, S], ids i64[T, K] -> [T, count], with 0 for neurons of other experts."""
    size = count + padded
    sizes = [-1] * (chosen.meta["val"].dim() - 1) + [size]
    column = call(aten.slice.Tensor, chosen, -1, 0, 1)
    zeros = call(aten.zeros_like.default, call(aten.expand.default, column, sizes))
    targets = call(aten.index.Tensor, indices, [ids])
    values = call(aten.sum.dim_IntList, call(aten.scatter.src, zeros, -1, targets, chosen), [-2])
    return call(aten.slice.Tensor, values, -1, 0, count) if padded else values


def _expand_ids(call: Call, ids: fx.Node, values: fx.Node) -> fx.Node:
    """ids [T, K] as [T, K, S], S being the last size of `values`."""
    sizes: list[Any] = [-1] * ids.meta["val"].dim() + [int(values.meta["val"].shape[-1])]
    return call(aten.expand.default, call(aten.unsqueeze.default, ids, -1), sizes)
