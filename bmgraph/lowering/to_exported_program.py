"""Converts a program to a torch.export ExportedProgram, the input of torch's exporters."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from bmgraph.ir.eval_form import eval_form
from bmgraph.ir.program import Program, copy_graph, output_node
from bmgraph.lowering.fold_masks import fold_masks
from bmgraph.lowering.fold_weights import fold_networks, fold_weights
from bmgraph.lowering.local_decompositions import LocallyDecomposed
from bmgraph.lowering.store_codes import store_codes
from bmgraph.utils.stored_tensor import in_memory
from bmgraph.utils.torch_internals import module_call_graph, value_ranges

MARK = "bmgraph:"
"""Prefix of the last entry of a node's module stack, its name: exporters copy the stack to the nodes they create."""


def deployed(program: Program) -> Program:
    """A copy of the program for serving, with its entry alone.

    It is in eval form, without losses and the inputs that only losses need; weights that trained in codes are these codes,
    masks are folded into weights, and weights that are expressions are computed.
    """
    served = alone(program)
    graph = served.graph
    eval_form(graph, len(program.outputs))
    output = output_node(graph)
    values: Any = output.args[0]
    kept = [(spec, node) for spec, node in zip(program.outputs, values) if spec.name not in program.losses]
    if kept:
        output.args = (tuple(node for _, node in kept),)
        served.outputs = tuple(spec for spec, _ in kept)
        served.losses = ()
    served.writes = ()
    store_codes(served)
    fold_masks(served)
    fold_networks(served)
    fold_weights(served)
    _separate_outputs(served)
    trim(served)
    return served


def alone(program: Program) -> Program:
    """A copy of the program with its entry alone."""
    copied = program.clone()
    copied.graphs = {copied.entry: copied.graph}
    copied.signatures = {copied.entry: copied.signatures[copied.entry]}
    return copied


def _separate_outputs(program: Program) -> None:
    """Give every output a node of its own, in place: exporters and engines confuse an output that is another one, an
    input or a parameter."""
    output = output_node(program.graph)
    values: Any = output.args[0]
    seen: set[fx.Node] = set()
    separate = []
    with program.edit() as editor:
        for node in values:
            shared = node in seen or node.op != "call_function"
            seen.add(node)
            separate.append(
                editor.call(torch.ops.aten.clone.default, node, like=node, before=output) if shared else node
            )
        output.args = (tuple(separate),)


def trim(program: Program) -> None:
    """Remove the calls, inputs and tensors that the outputs of a program of one graph do not need, in place.

    Batches may still hold the inputs.
    """
    graph = program.graph
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users:
            graph.erase_node(node)
    used = {str(node.target) for node in graph.nodes if node.op == "placeholder"}
    program.ignored += tuple(spec.name for spec in program.inputs if spec.name not in used)
    program.inputs = tuple(spec for spec in program.inputs if spec.name in used)
    program.cache = program.cache and program.cache.without_unused(program.inputs)
    program.example = {name: tensor for name, tensor in program.example.items() if name in used}
    names = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    program.parameters = {name: tensor for name, tensor in program.parameters.items() if name in names}
    program.buffers = {name: tensor for name, tensor in program.buffers.items() if name in names}


def exported_program(program: Program, locally: bool = True) -> ExportedProgram:
    """The ExportedProgram of a program from `deployed`, built from its graph without tracing.

    With `locally` it decomposes single calls where torch would trace the whole again (`local_decompositions.py`).
    """
    source = copy_graph(program.graph)
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    inputs: list[InputSpec] = []
    readers = {str(node.target): node for node in source.nodes if node.op == "get_attr"}
    for index, (name, node) in enumerate(readers.items()):
        values[node] = graph.placeholder(f"t_{index}_{re.sub(r'[^0-9A-Za-z_]', '_', name)}")
        kind = InputKind.PARAMETER if name in program.parameters else InputKind.BUFFER
        persistent = None if kind is InputKind.PARAMETER else True
        inputs.append(InputSpec(kind, TensorArgument(values[node].name), name, persistent))
        values[node].meta = {"val": node.meta["val"]}
    input_nodes = {str(node.target): node for node in source.nodes if node.op == "placeholder"}
    for spec in program.inputs:
        node = input_nodes[spec.name]
        values[node] = graph.placeholder(f"input_{spec.name}")
        values[node].meta = {"val": node.meta["val"]}
        inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(values[node].name), None))
    for node in source.nodes:
        if node.op == "call_function":
            values[node] = graph.node_copy(node, lambda old: values[old])
            values[node].meta = {"val": node.meta["val"], "nn_module_stack": _module_stack(node)}
            if "stack_trace" in node.meta:
                values[node].meta["stack_trace"] = node.meta["stack_trace"]
    returned: Any = output_node(source).args[0]
    graph.output(tuple(values[node] for node in returned))
    outputs = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(values[node].name), None) for node in returned
    ]
    state: dict[str, Any] = {
        name: torch.nn.Parameter(in_memory(tensor), requires_grad=False)
        for name, tensor in program.parameters.items()
        if name in readers
    }
    state |= {name: tensor for name, tensor in program.buffers.items() if name in readers}
    root = torch.nn.Module()
    made: type[ExportedProgram] = LocallyDecomposed if locally else ExportedProgram
    return made(
        root, graph, ExportGraphSignature(inputs, outputs), state, _ranges(program),
        module_call_graph(len(program.inputs), len(returned)), None, {},
    )  # fmt: skip


def _module_stack(node: fx.Node) -> dict[str, tuple[str, str]]:
    stack = dict(node.meta.get("nn_module_stack") or {})
    stack[MARK] = (f"{MARK}{node.name}", "bmgraph.Node")
    return stack


def _ranges(program: Program) -> dict[Any, Any]:
    """The range of every symbol of the inputs."""
    symbol_bounds: dict[Any, tuple[int, int | None]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            for size in node.meta["val"].shape:
                if isinstance(size, torch.SymInt):
                    for symbol in size.node.expr.free_symbols:
                        bounds = program.ranges.get(program.symbols.get(symbol, ""))
                        symbol_bounds[symbol] = (2, bounds.high if bounds else None)
    return value_ranges(symbol_bounds)
