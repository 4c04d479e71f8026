"""Adapters beside blocks of linears (He et al. 2022, arXiv:2110.04366): from the input of an attention or a feed-forward to
its output."""

from __future__ import annotations

from torch import fx

from bmgraph.analysis.structure.finder import find
from bmgraph.deltas.bottleneck import PlainBottleneckFamily
from bmgraph.deltas.delta_calls import DeltaCalls
from bmgraph.ir.node_role import delta_role
from bmgraph.ir.program import Program


class ParallelAdapterFamily(PlainBottleneckFamily):
    """Two matrices, down [r, in] and up [out, r], that read the input of the block that ends in the linear."""

    name = "parallel_adapter"
    roles = (delta_role("parallel_adapter"),)
    peft_type = "PARALLEL_ADAPTER"

    def value(self, call: DeltaCalls) -> fx.Node:
        """The input of the block."""
        read: fx.Node = call.source
        return read

    def sources(self, program: Program) -> dict[str, fx.Node]:
        """The query of each attention, by the node of its last linear, and the first linear of each feed-forward.

        Where a linear is used several times, each use has the nearest one in front of it.
        """
        structure = find(program)
        ends = {
            (item.o, item.q.linear): None
            for item in structure.attentions
            if item.o is not None and item.q is not None
        } | {(item.down, item.up.linear): None for item in structure.feedforwards}
        nodes = {name: list(graph.nodes) for name, graph in program.graphs.items()}
        order = {
            (name, node.name): index for name, known in nodes.items() for index, node in enumerate(known)
        }
        found: dict[str, fx.Node] = {}
        for last, first in ends:
            for use in structure.linear(last).uses:
                starts = [
                    order[use.graph, item.node]
                    for item in structure.linear(first).uses
                    if item.graph == use.graph and order[use.graph, item.node] < order[use.graph, use.node]
                ]
                if starts:
                    found[use.node] = nodes[use.graph][max(starts)]
        return found
