"""Splits the encoder off a decoder, as a program that runs once for each prompt."""

from __future__ import annotations

import torch
from torch import fx

from bmgraph.ir.program import Program, output_node, placeholders
from bmgraph.ir.shape_inference import dims
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.lowering.to_exported_program import trim
from bmgraph.passes.kvcache.sequence_roles import SequenceRoles

aten = torch.ops.aten


def split_encoder(program: Program, roles: SequenceRoles) -> Program | None:
    """The program that computes the decoder's memories; None where there is no encoder."""
    if not roles.memories:
        return None
    encoder = program.clone()
    copies = {node.name: node for node in encoder.graph.nodes}
    inputs = {name for name, node in placeholders(program.graph).items() if node in roles.encoder}
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
    encoder.training = "it is the encoder of a program with a KV cache"
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
