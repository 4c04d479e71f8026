"""Which operators a compiler of kernels can join with their neighbours: elementwise calls, reductions, and what moves elements."""

from __future__ import annotations

from typing import Any

import torch

from bmgraph.ops.trait_row import Dims
from bmgraph.ops.traits import row_of

aten = torch.ops.aten

FUSIBLE_DIMS = {
    Dims.ELEMENTWISE, Dims.SIZES_ALONE, Dims.NEW, Dims.CREATED, Dims.PERMUTED, Dims.EXPANDED, Dims.MOVED, Dims.PADDED,
    Dims.BANDED, Dims.ALONG, Dims.NORMED, Dims.REDUCED,
}  # fmt: skip
OF_STEPS = {
    aten._softmax_backward_data, aten._log_softmax_backward_data, aten.native_layer_norm_backward, aten._fused_rms_norm,
    aten._fused_rms_norm_backward, aten.slice_backward, aten.select_backward,
}  # fmt: skip
"""Operators of steps alone, which have no row."""
APART = {
    torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape,
}  # fmt: skip


def is_fusible(target: Any) -> bool:
    """Whether a call of `target` computes by elements, by reductions or by moving elements; nothing random."""
    if not isinstance(target, torch._ops.OpOverload) or APART.intersection(target.tags):
        return False
    return (
        torch.Tag.pointwise in target.tags
        or row_of(target).dims in FUSIBLE_DIMS
        or target.overloadpacket in OF_STEPS
    )


def may_view(target: Any) -> bool:
    """Whether the result of a call is a view of its first argument, or may be one."""
    return is_view(target) or getattr(target, "overloadpacket", None) is aten.reshape


def is_view(target: Any) -> bool:
    """Whether the result of a call is always a view of its first argument."""
    if not isinstance(target, torch._ops.OpOverload) or target.overloadpacket is aten.reshape:
        return False
    returns = target._schema.returns
    shares = len(returns) == 1 and returns[0].alias_info is not None and not returns[0].alias_info.is_write
    return shares or target.overloadpacket is aten._unsafe_view
