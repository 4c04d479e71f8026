"""Splits the encoder off a decoder, as a graph that runs once for each prompt."""

from __future__ import annotations

import torch
from torch import fx

from bmgraph.ir.graph_order import running_order
from bmgraph.ir.program import Program, output_node, placeholders
from bmgraph.ir.shape_inference import dims
from bmgraph.ir.tensor_spec import Range, TensorSpec
from bmgraph.lowering.to_exported_program import trim
from bmgraph.passes.kvcache.max_positions import max_positions
from bmgraph.passes.kvcache.sequence_roles import SequenceRoles, find_encoder_roles

aten = torch.ops.aten


ENCODER = "encoder"
"""The name of the graph, as far as it is free."""


def add_encoder(cached: Program, source: Program, roles: SequenceRoles) -> None:
    """Add the graph that computes the decoder's memories in `source` to the program with a cache, if there are any."""
    if not roles.memories:
        return
    name, count = ENCODER, 1
    while name in cached.graphs:
        count += 1
        name = f"{ENCODER}_{count}"
    encoder = _memories_alone(source, roles)
    _bound(cached, encoder)
    cached.add_graph(name, encoder)
    cached.graphs = {entry.entry: entry.graph for entry in running_order(cached)}


def _bound(cached: Program, encoder: Program) -> None:
    """Note how many positions the encoder has rows for, where it has a table of them."""
    found = find_encoder_roles(encoder)
    limit = None if found is None else max_positions(encoder, found)
    if found is None or limit is None:
        return
    size = next(str(spec.shape[1]) for spec in encoder.inputs if spec.name == found.tokens.target)
    low = encoder.ranges.get(size, Range()).low
    if limit >= low:
        bound = {size: Range(low, limit)}
        encoder.ranges = {**encoder.ranges, **bound}
        cached.ranges = {**cached.ranges, **bound}


def _memories_alone(program: Program, roles: SequenceRoles) -> Program:
    """The program, of one graph, with the decoder's memories as its outputs."""
    encoder = program.clone()
    copies = {node.name: node for node in encoder.graph.nodes}
    inputs = {name for name, node in placeholders(program.graph).items() if node in roles.independent}
    with encoder.edit() as editor:
        _take_sizes_from(encoder.graph, inputs)
        returned = []
        for node in roles.memories:
            copy = copies[node.name]
            if copy.op == "placeholder":
                copy = editor.call(aten.clone.default, copy, like=output_node(encoder.graph))
            returned.append(copy)
        output_node(encoder.graph).args = (tuple(returned),)
    encoder.outputs = tuple(
        TensorSpec(name, node.meta["val"].dtype, dims(encoder, node.meta["val"]))
        for node, name in zip(returned, roles.memories.values())
    )
    trim(encoder)
    return encoder


def _take_sizes_from(graph: fx.Graph, inputs: set[str]) -> None:
    """Read every size from one of `inputs`, if another input was used that has the same size."""
    nodes = placeholders(graph)
    size_sources = {
        size.node.expr: (nodes[name], axis)
        for name in sorted(inputs)
        for axis, size in enumerate(nodes[name].meta["val"].shape)
        if isinstance(size, torch.SymInt)
    }
    for node in graph.nodes:
        if node.target is aten.sym_size.int and node.args[0].op == "placeholder":
            source = size_sources.get(getattr(node.meta["val"], "node", None) and node.meta["val"].node.expr)
            if source is not None and node.args[0].target not in inputs:
                node.args = source
