"""From torch's ExportedProgram to a Program in normal form."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from bmgraph.errors import CaptureError
from bmgraph.frontend.canonicalize.canonicalize import normalize
from bmgraph.frontend.canonicalize.functionalize import functionalise
from bmgraph.frontend.canonicalize.inline_regions import inline_regions
from bmgraph.ir.editor import remove_dead
from bmgraph.ir.program import FORWARD, Program, output_node, placeholders
from bmgraph.ir.shape_inference import dims
from bmgraph.ir.tensor_spec import Range, TensorSpec
from bmgraph.utils.digest import fingerprint
from bmgraph.utils.torch_internals import output_names


def program_of(
    model: nn.Module, exported: torch.export.ExportedProgram, tensors: dict[str, torch.Tensor]
) -> Program:
    canonical, ties = _ties(model)
    state: dict[str, torch.Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    names: dict[str, str] = {}
    parameters: dict[str, torch.Tensor] = {}
    buffers: dict[str, torch.Tensor] = {}
    kinds = torch.export.graph_signature.InputKind
    for spec in exported.graph_signature.input_specs:
        if spec.kind is kinds.USER_INPUT:
            continue
        target = spec.target
        if target is None:
            raise CaptureError(
                f"the model takes a {spec.kind.name.lower().replace('_', ' ')}, which no graph can hold"
            )
        found = state.get(target)
        if found is None:
            found = exported.constants.get(target)
            target = f"constant.{target}"
        if not isinstance(found, torch.Tensor):
            raise CaptureError(
                f"{target!r} is a {type(found).__name__}, which no graph can hold: keep tensors only"
            )
        target = canonical.get(target, target)
        names[spec.arg.name] = target
        (parameters if isinstance(found, nn.Parameter) else buffers)[target] = found.detach()
    readers: dict[str, fx.Node] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            target = names[node.name]
            if target not in readers:
                readers[target] = graph.get_attr(target)
                readers[target].meta["val"] = node.meta["val"]
            values[node] = readers[target]
        elif node.op == "placeholder":
            if node.name not in tensors:
                values[node] = node.meta.get("val")
                continue
            values[node] = graph.placeholder(node.name)
            values[node].meta["val"] = node.meta["val"]
        elif node.op == "output":
            _finish(graph, node, values)
        elif node.op == "get_attr":
            values[node] = None
        else:
            region = inline_regions(exported.graph_module, node, graph, values)
            if region is not None:
                values[node] = region
            elif node.target is operator.getitem and isinstance(values[node.args[0]], tuple):
                values[node] = values[node.args[0]][node.args[1]]
            else:
                values[node] = graph.node_copy(node, lambda old: values[old])
    parameters = {name: parameters[name] for name in dict(model.named_parameters()) if name in parameters}
    trained = dict(model.named_parameters(remove_duplicate=False))
    program = Program(
        graphs={FORWARD: graph},
        parameters=parameters,
        buffers=buffers,
        inputs=(),
        outputs=(),
        ties={alias: name for alias, name in ties.items() if name in parameters},
        example={name: tensor.detach().clone() for name, tensor in tensors.items()},
        frozen=frozenset(name for name in parameters if not trained[name].requires_grad),
        fingerprint=fingerprint(parameters),
    )
    _normal_form(program, exported, tensors)
    return program


def _finish(graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Any]) -> None:
    results: Any = node.args[0]
    returned = [values[item] if isinstance(item, fx.Node) else item for item in results]
    output = graph.output(tuple(returned))
    output.meta = {}


def _normal_form(
    program: Program, exported: torch.export.ExportedProgram, tensors: dict[str, torch.Tensor]
) -> None:
    graph = program.graph
    output = output_node(graph)
    names = output_names(exported.call_spec.out_spec)
    leaves: Any = output.args[0]
    kept = [(name, leaf) for name, leaf in zip(names, leaves) if isinstance(leaf, fx.Node)]
    output.args = (tuple(leaf for _, leaf in kept),)
    _scopes(graph)
    for name in placeholders(graph):
        if name not in tensors:
            raise CaptureError(f"export made an input {name!r} of its own, which is not supported")
    _order_inputs(program, exported, tensors)
    writes = functionalise(graph, set(program.buffers))
    program.writes = tuple(writes)
    returned: Any = output.args[0]
    output.args = (tuple(returned) + tuple(writes.values()),)
    normalize(program)
    remove_dead(program)
    graph.lint()
    returned = output.args[0]
    specs = []
    for (name, _), node in zip(kept, returned):
        found = node.meta["val"]
        specs.append(TensorSpec(name, found.dtype, dims(program, found)))
    program.outputs = tuple(specs)
    program.losses = tuple(
        spec.name for spec in specs if spec.name.split(".")[-1] == "loss" and spec.shape == ()
    )


def _order_inputs(
    program: Program, exported: torch.export.ExportedProgram, tensors: dict[str, torch.Tensor]
) -> None:
    """Specs of the inputs, with readable names for the sizes that stayed dynamic."""
    nodes = placeholders(program.graph)
    unused = [name for name in tensors if name not in nodes]
    for name in unused:
        raise CaptureError(f"input {name!r} did not reach the graph")
    ranges = exported.range_constraints
    for name, tensor in tensors.items():
        for axis, size in enumerate(nodes[name].meta["val"].shape):
            if isinstance(size, torch.SymInt):
                _name_symbols(program, size, name, axis, tensor.dim(), ranges)
    program.inputs = tuple(
        TensorSpec(name, tensor.dtype, dims(program, nodes[name].meta["val"]))
        for name, tensor in tensors.items()
    )
    program.example = {name: program.example[name] for name in tensors}
    program.fixed = tuple(
        f"{spec.name}[{axis}] = {dim}"
        for spec in program.inputs
        for axis, dim in enumerate(spec.shape)
        if isinstance(dim, int) and axis < 2 and not (axis == 1 and len(spec.shape) == 4)
    )


def _name_symbols(
    program: Program, size: torch.SymInt, name: str, axis: int, rank: int, ranges: Mapping[Any, Any]
) -> None:
    usual = {
        0: "batch",
        1: "channels" if rank == 4 else "sequence",
        2: "height" if rank == 4 else "features",
        3: "width",
    }
    for symbol in sorted(size.node.expr.free_symbols, key=str):
        if symbol in program.symbols:
            continue
        stem = usual.get(axis, f"size_{axis}")
        if axis == 0 and _is_batch(program, name):
            program.symbols[symbol] = stem
            program.ranges.setdefault(stem, Range())
            continue
        label, count = stem, 1
        while label in program.symbols.values():
            count += 1
            label = f"{stem}_{count}"
        program.symbols[symbol] = label
        bounds = ranges.get(symbol)
        low = int(bounds.lower) if bounds is not None and bounds.lower.is_Integer else 1
        high = (
            int(bounds.upper) if bounds is not None and getattr(bounds.upper, "is_Integer", False) else None
        )
        program.ranges[label] = Range(
            1 if low <= 2 else low, high if high is not None and high < 2**31 else None
        )


def _is_batch(program: Program, name: str) -> bool:
    """Whether an input is as long as the first one: rows of one batch."""
    sizes = [tensor.shape[0] for tensor in program.example.values() if tensor.dim()]
    return program.example[name].shape[0] == sizes[0]


def _scopes(graph: fx.Graph) -> None:
    """Write the module path on every node."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            path = str(list(stack.values())[-1][0])
            node.meta["scope"] = path.replace("L['self'].", "").replace("L['self']", "")


def _ties(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """For every name of a parameter or buffer the one it is kept under, and the aliases alone."""
    first: dict[int, str] = {}
    canonical: dict[str, str] = {}
    ties: dict[str, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        kept = first.setdefault(id(tensor), name)
        canonical[name] = kept
        if kept != name:
            ties[name] = kept
    return canonical, ties
