"""Adapters beside blocks of linears (He et al. 2022, arXiv:2110.04366): from the input of an attention or a feed-forward to
its output."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from bmgraph.analysis.structure.finder import find
from bmgraph.deltas.adapter import DOWN, UP
from bmgraph.deltas.bottleneck import DOWN_BIAS, UP_BIAS, BottleneckFamily
from bmgraph.deltas.delta_calls import DeltaCalls, delta_input
from bmgraph.ir.node_role import delta_role
from bmgraph.ir.program import Program


class ParallelAdapterFamily(BottleneckFamily):
    """Two matrices, down [r, in] and up [out, r], that read the input of the block that ends in the linear."""

    name = "parallel_adapter"
    roles = (delta_role("parallel_adapter"),)
    peft_type = "PARALLEL_ADAPTER"
    keys = (DOWN, DOWN_BIAS, UP, UP_BIAS)
    axes = {DOWN: 2, DOWN_BIAS: 1, UP: 2, UP_BIAS: 1}

    def value(self, call: DeltaCalls) -> fx.Node:
        """The input of the block."""
        read: fx.Node = call.source
        return read

    def matrices(self, call: DeltaCalls, tensors: Mapping[str, fx.Node]) -> tuple[fx.Node, fx.Node]:
        """The parameters."""
        return tensors[DOWN], tensors[UP]

    def matrices_of(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The parameters."""
        return tensors[DOWN], tensors[UP]

    def sources(self, program: Program) -> dict[str, fx.Node]:
        """The input of the query of each attention, by the node of its last linear, and that of the first linear of each
        feed-forward.

        Where a linear is used several times, each use has the nearest input in front of it.
        """
        structure = find(program)
        ends = {
            (item.o, item.q.linear): None
            for item in structure.attentions
            if item.o is not None and item.q is not None
        } | {(item.down, item.up.linear): None for item in structure.feedforwards}
        found: dict[str, fx.Node] = {}
        for last, first in ends:
            nodes = {graph: list(program.graphs[graph].nodes) for graph in program.graphs}
            for use in structure.linear(last).uses:
                order = {node.name: index for index, node in enumerate(nodes[use.graph])}
                starts = [
                    order[item.node]
                    for item in structure.linear(first).uses
                    if item.graph == use.graph and order[item.node] < order[use.node]
                ]
                if starts:
                    found[use.node] = delta_input(nodes[use.graph][max(starts)])
        return found
