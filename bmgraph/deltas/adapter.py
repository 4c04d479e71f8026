"""Adapters behind linears, in a row with them (Houlsby et al. 2019, arXiv:1902.00751)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from bmgraph.deltas.bottleneck import DOWN_BIAS, UP_BIAS, BottleneckFamily
from bmgraph.deltas.delta_calls import DeltaCalls
from bmgraph.ir.node_role import delta_role

DOWN, UP = "down", "up"


class AdapterFamily(BottleneckFamily):
    """Two matrices, down [r, out] and up [out, r], that read the output of the linear."""

    name = "adapter"
    roles = (delta_role("adapter"),)
    peft_type = "ADAPTER"
    keys = (DOWN, DOWN_BIAS, UP, UP_BIAS)
    axes = {DOWN: 2, DOWN_BIAS: 1, UP: 2, UP_BIAS: 1}

    def matrices(self, call: DeltaCalls, tensors: Mapping[str, fx.Node]) -> tuple[fx.Node, fx.Node]:
        """The parameters."""
        return tensors[DOWN], tensors[UP]

    def matrices_of(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The parameters."""
        return tensors[DOWN], tensors[UP]
