"""Compacter: adapters whose matrices are sums of Kronecker products (Mahabadi et al. 2021, arXiv:2106.04647).

A parameterised hypercomplex multiplication (PHM): a matrix [p, q] is the sum over i of `kron(rule[i], left[i] @ right[i])`, with
rule [n, n, n], left [n, p / n, k] and right [n, k, q / n]. All adapters of a program share one rule.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from bmgraph.deltas.bottleneck import DOWN_BIAS, UP_BIAS, BottleneckFamily
from bmgraph.deltas.delta_calls import DeltaCalls
from bmgraph.deltas.low_rank_adapter import DOWN_LEFT, DOWN_RIGHT, UP_LEFT, UP_RIGHT
from bmgraph.ir.node_role import delta_role

aten = torch.ops.aten

RULE = "rule"


class CompacterFamily(BottleneckFamily):
    """Adapters whose matrices are sums of Kronecker products of a rule, that all share, and products of low rank."""

    name = "compacter"
    roles = (delta_role("compacter"),)
    peft_type = "COMPACTER"
    keys = (RULE, DOWN_LEFT, DOWN_RIGHT, DOWN_BIAS, UP_LEFT, UP_RIGHT, UP_BIAS)
    axes = {RULE: 3, DOWN_LEFT: 3, DOWN_RIGHT: 3, DOWN_BIAS: 1, UP_LEFT: 3, UP_RIGHT: 3, UP_BIAS: 1}
    shared = (RULE,)

    def matrices(self, call: DeltaCalls, tensors: Mapping[str, fx.Node]) -> tuple[fx.Node, fx.Node]:
        """The sums: of each pair of blocks of rule and product one entry, moved to its place."""

        def matrix(left: fx.Node, right: fx.Node) -> fx.Node:
            product = call(aten.matmul.default, left, right)
            grown = call(aten.unsqueeze.default, call(aten.unsqueeze.default, product, 1), 3)
            rule = call(aten.unsqueeze.default, call(aten.unsqueeze.default, tensors[RULE], 2), 4)
            kron = call(aten.sum.dim_IntList, call(aten.mul.Tensor, rule, grown), [0])
            return call(aten.flatten.using_ints, call(aten.flatten.using_ints, kron, 0, 1), 1, 2)

        return matrix(tensors[DOWN_LEFT], tensors[DOWN_RIGHT]), matrix(tensors[UP_LEFT], tensors[UP_RIGHT])

    def matrices_of(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums, with torch's own Kronecker product."""

        def matrix(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.kron(a, b @ c) for a, b, c in zip(tensors[RULE], left, right)]).sum(0)

        return matrix(tensors[DOWN_LEFT], tensors[DOWN_RIGHT]), matrix(tensors[UP_LEFT], tensors[UP_RIGHT])
