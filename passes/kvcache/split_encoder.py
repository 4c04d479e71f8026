"""The encoder in front of a decoder: a program of its own, which runs once for a prompt."""

from __future__ import annotations

import torch
from torch import fx

from bmgraph.ir.program import Program, output_node, placeholders
from bmgraph.ir.shape_inference import dims
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.lowering.to_exported_program import trim
from bmgraph.passes.kvcache.sequence_roles import Sides

aten = torch.ops.aten


def encoder_of(program: Program, sides: Sides) -> Program | None:
    """The program that makes the decoder's memories, None where there is no encoder."""
    if not sides.memories:
        return None
    encoder = program.clone()
    twins = {node.name: node for node in encoder.graph.nodes}
    inputs = {name for name, node in placeholders(program.graph).items() if node in sides.encoder}
    with encoder.edit() as editor:
        _measure_inputs(encoder.graph, inputs)
        returned = []
        for node in sides.memories:
            twin = twins[node.name]
            if twin.op == "placeholder":
                twin = editor.call(aten.clone.default, twin, like=output_node(encoder.graph))
            returned.append(twin)
        output_node(encoder.graph).args = (tuple(returned),)
    encoder.outputs = tuple(
        TensorSpec(name, node.meta["val"].dtype, dims(encoder, node.meta["val"]))
        for node, name in zip(returned, sides.memories.values())
    )
    encoder.training = "it is a part of a program with a cache"
    trim(encoder)
    return encoder


def _measure_inputs(graph: fx.Graph, inputs: set[str]) -> None:
    """Take every size from one of these inputs, where it was taken from another that has it too."""
    found = placeholders(graph)
    axes = {
        size.node.expr: (found[name], axis)
        for name in sorted(inputs)
        for axis, size in enumerate(found[name].meta["val"].shape)
        if isinstance(size, torch.SymInt)
    }
    for node in graph.nodes:
        if node.target is aten.sym_size.int and node.args[0].op == "placeholder":
            source = axes.get(getattr(node.meta["val"], "node", None) and node.meta["val"].node.expr)
            if source is not None and node.args[0].target not in inputs:
                node.args = source
