"""Build a Program from torch's ExportedProgram: its graph, tensors, input specs and names of dynamic sizes."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from bmgraph.analysis.input_kinds import with_kinds
from bmgraph.analysis.value_ranges import with_value_ranges
from bmgraph.errors import CaptureError
from bmgraph.frontend.canonicalize.canonicalize import canonicalize
from bmgraph.frontend.canonicalize.functionalize import functionalize
from bmgraph.frontend.canonicalize.inline_regions import inline_regions
from bmgraph.ir.editor import remove_dead
from bmgraph.ir.program import FORWARD, Program, output_node, placeholders
from bmgraph.ir.shape_inference import dims
from bmgraph.ir.signature import Signature
from bmgraph.ir.tensor_spec import Range, TensorSpec
from bmgraph.utils.digest import fingerprint
from bmgraph.utils.graph_copies import copy_node
from bmgraph.utils.torch_internals import output_names


def import_exported(
    model: nn.Module, exported: torch.export.ExportedProgram, tensors: dict[str, torch.Tensor]
) -> Program:
    """The program in canonical form of a model that was exported with the inputs `tensors`, by name.

    Parameters and buffers share their storage with the model. Raises CaptureError if the graph needs a value that is
    not a tensor.
    """
    kept_names, ties = _tied_names(model)
    state = _state_of(model, exported, kept_names)
    trained = dict(model.named_parameters(remove_duplicate=False))
    parameters = {
        name: state.parameters[name] for name in dict(model.named_parameters()) if name in state.parameters
    }
    program = Program(
        graphs={FORWARD: _copy_graph(exported, state.names, tensors)},
        parameters=parameters,
        buffers=state.buffers,
        signatures={
            FORWARD: Signature(example={name: tensor.detach().clone() for name, tensor in tensors.items()})
        },
        ties={alias: name for alias, name in ties.items() if name in parameters},
        frozen=frozenset(name for name in parameters if not trained[name].requires_grad),
        fingerprint=fingerprint(parameters),
    )
    _complete(program, exported, tensors)
    return program


@dataclass(frozen=True)
class _State:
    """The tensors that an exported graph reads besides its inputs."""

    names: dict[str, str]
    """By placeholder: the name of its tensor."""
    parameters: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    """Buffers of the model, and constants of the graph under `constant.*`."""


def _state_of(
    model: nn.Module, exported: torch.export.ExportedProgram, kept_names: Mapping[str, str]
) -> _State:
    named: dict[str, torch.Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    state = _State({}, {}, {})
    kinds = torch.export.graph_signature.InputKind
    for spec in exported.graph_signature.input_specs:
        if spec.kind is kinds.USER_INPUT:
            continue
        target = spec.target
        if target is None:
            raise CaptureError(
                f"the model reads a {spec.kind.name.lower().replace('_', ' ')}, which a graph cannot hold"
            )
        found = named.get(target)
        if found is None:
            found = exported.constants.get(target)
            target = f"constant.{target}"
        if not isinstance(found, torch.Tensor):
            raise CaptureError(
                f"{target!r} is a {type(found).__name__}, which a graph cannot hold: keep tensors only"
            )
        target = kept_names.get(target, target)
        state.names[spec.arg.name] = target
        group = state.parameters if isinstance(found, nn.Parameter) else state.buffers
        group[target] = found.detach()
    return state


def _copy_graph(
    exported: torch.export.ExportedProgram, names: Mapping[str, str], tensors: Mapping[str, torch.Tensor]
) -> fx.Graph:
    """The exported graph with one `get_attr` for each tensor in `names`, placeholders for `tensors`, regions inlined."""
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
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
            results: Any = node.args[0]
            returned = [values[item] if isinstance(item, fx.Node) else item for item in results]
            graph.output(tuple(returned)).meta = {}
        elif node.op == "get_attr":
            values[node] = None
        else:
            region = inline_regions(exported.graph_module, node, graph, values)
            if region is not None:
                values[node] = region
            elif node.target is operator.getitem and isinstance(values[node.args[0]], tuple):
                values[node] = values[node.args[0]][node.args[1]]
            else:
                values[node] = copy_node(graph, node, values.__getitem__)
    return graph


def _complete(
    program: Program, exported: torch.export.ExportedProgram, tensors: dict[str, torch.Tensor]
) -> None:
    """Set the program's inputs, outputs, writes and losses, and bring its graph to canonical form."""
    graph = program.graph
    output = output_node(graph)
    names = output_names(exported.call_spec.out_spec)
    leaves: Any = output.args[0]
    kept = [(name, leaf) for name, leaf in zip(names, leaves) if isinstance(leaf, fx.Node)]
    if not kept:
        raise CaptureError("forward returns no tensor: return at least one that depends on the inputs")
    output.args = (tuple(leaf for _, leaf in kept),)
    _set_scopes(graph)
    for name in placeholders(graph):
        if name not in tensors:
            raise CaptureError(f"torch.export added an input {name!r}, which is not supported")
    _set_inputs(program, exported, tensors)
    writes = functionalize(graph, set(program.buffers))
    program.writes = tuple(writes)
    returned: Any = output.args[0]
    output.args = (tuple(returned) + tuple(writes.values()),)
    canonicalize(program)
    remove_dead(program)
    graph.lint()
    returned = output.args[0]
    specs = []
    for (name, _), node in zip(kept, returned):
        found = node.meta["val"]
        specs.append(TensorSpec(name, found.dtype, dims(program, found)))
    program.outputs = tuple(specs)
    program.inputs = with_value_ranges(program)
    program.losses = tuple(
        spec.name for spec in specs if spec.name.split(".")[-1] == "loss" and spec.shape == ()
    )
    program.inputs = with_kinds(program)


def _set_inputs(
    program: Program, exported: torch.export.ExportedProgram, tensors: dict[str, torch.Tensor]
) -> None:
    """Set the input specs, with readable names for dynamic sizes, and list the fixed ones."""
    nodes = placeholders(program.graph)
    for name in tensors:
        if name not in nodes:
            raise CaptureError(f"the exported graph lacks input {name!r}")
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
    """Name the symbols of one size of an input after its axis, and set their ranges."""
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
        if axis == 0 and _has_batch_size(program, name):
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
        # torch.export assumes that a dynamic size is at least 2, and writes "no limit" as a huge number
        program.ranges[label] = Range(
            1 if low <= 2 else low, high if high is not None and high < 2**31 else None
        )


def _has_batch_size(program: Program, name: str) -> bool:
    """Whether the first axis of an input has the size of the first input's first axis, the batch."""
    sizes = [tensor.shape[0] for tensor in program.example.values() if tensor.dim()]
    return program.example[name].shape[0] == sizes[0]


def _set_scopes(graph: fx.Graph) -> None:
    """Write the module path of every node into its metadata, as `scope`."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            path = str(list(stack.values())[-1][0])
            node.meta["scope"] = path.replace("L['self'].", "").replace("L['self']", "")


def _tied_names(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """The name that each parameter or buffer is kept under, by every name it has; and the aliases alone."""
    first: dict[int, str] = {}
    kept_names: dict[str, str] = {}
    ties: dict[str, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        kept = first.setdefault(id(tensor), name)
        kept_names[name] = kept
        if kept != name:
            ties[name] = kept
    return kept_names, ties
