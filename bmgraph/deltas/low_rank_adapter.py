"""Adapters whose matrices are products of low rank (as OpenDelta has them; Mahabadi et al. 2021, arXiv:2106.04647)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from bmgraph.deltas.bottleneck import DOWN_BIAS, UP_BIAS, BottleneckFamily
from bmgraph.deltas.delta_calls import DeltaCalls
from bmgraph.ir.node_role import delta_role

aten = torch.ops.aten

DOWN_LEFT, DOWN_RIGHT, UP_LEFT, UP_RIGHT = "down_left", "down_right", "up_left", "up_right"


class LowRankAdapterFamily(BottleneckFamily):
    """Adapters with down = down_left [r, k] down_right [k, out] and up = up_left [out, k] up_right [k, r]."""

    name = "low_rank_adapter"
    roles = (delta_role("low_rank_adapter"),)
    peft_type = "LOW_RANK_ADAPTER"
    keys = (DOWN_LEFT, DOWN_RIGHT, DOWN_BIAS, UP_LEFT, UP_RIGHT, UP_BIAS)
    axes = {DOWN_LEFT: 2, DOWN_RIGHT: 2, DOWN_BIAS: 1, UP_LEFT: 2, UP_RIGHT: 2, UP_BIAS: 1}

    def matrices(self, call: DeltaCalls, tensors: Mapping[str, fx.Node]) -> tuple[fx.Node, fx.Node]:
        """The products."""
        down = call(aten.matmul.default, tensors[DOWN_LEFT], tensors[DOWN_RIGHT])
        return down, call(aten.matmul.default, tensors[UP_LEFT], tensors[UP_RIGHT])

    def matrices_of(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The products."""
        return tensors[DOWN_LEFT] @ tensors[DOWN_RIGHT], tensors[UP_LEFT] @ tensors[UP_RIGHT]
