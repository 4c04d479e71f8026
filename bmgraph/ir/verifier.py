"""The rules that a program of the model stage has to satisfy."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.errors import VerificationError
from bmgraph.ir.graph_order import running_order
from bmgraph.ir.program import Program, output_node, placeholders, tensor_nodes
from bmgraph.ir.shape_inference import dims
from bmgraph.ops.traits import traits_of
from bmgraph.utils.finite import is_finite
from bmgraph.utils.stored_tensor import source_of

SCALAR_MODULES = frozenset(
    {
        "_operator",
        "math",
        "torch",
        "builtins",
        "torch.fx.experimental.symbolic_shapes",
        "torch.utils._sympy.functions",
    }
)
"""Modules of the functions that a graph may call on sizes."""


def check_program(program: Program) -> None:
    """Raise VerificationError if the program breaks a rule of the model stage; the message names the node or tensor."""
    if set(program.signatures) != set(program.graphs):
        raise VerificationError(
            f"the program has the graphs {', '.join(program.graphs)}, but signatures of {', '.join(program.signatures)}: "
            "give every graph one signature, under the graph's name"
        )
    for entry in program.entries():
        _check_entry(entry)
    _check_feeders(program)
    for name, tensor in program.parameters.items():
        if not _is_known_finite(tensor):
            raise VerificationError(f"parameter {name!r} holds NaN or infinity")


def _is_known_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite, as far as that is known without reading a file."""
    if tensor.device.type == "meta":
        return True
    source = source_of(tensor)
    return is_finite(tensor) if source is None else source.finite is not False


def _check_entry(program: Program) -> None:
    name, graph = program.entry, program.graph
    try:
        graph.lint()
    except (RuntimeError, ValueError, AssertionError) as error:
        raise VerificationError(f"graph {name!r} is not well formed: {error}") from error
    if set(placeholders(graph)) != {spec.name for spec in program.inputs}:
        raise VerificationError(f"the inputs of graph {name!r} are not those of its signature")
    for target, node in tensor_nodes(graph).items():
        _check_tensor(program, target, node)
    for node in graph.nodes:
        if node.op == "call_function":
            _check_call(node)
    _check_outputs(program, graph)
    if program.cache is not None and (misfit := program.cache.misfit(program.inputs, program.outputs)):
        raise VerificationError(f"graph {name!r} does not fit its KV cache: {misfit}")


def _check_feeders(program: Program) -> None:
    """Raise VerificationError where graphs take each other's outputs in a circle, or two graphs give the same input."""
    running_order(program)
    for entry in program.entries():
        given: dict[str, str] = {}
        for feeder in entry.feeders():
            for name in {spec.name for spec in feeder.outputs}.intersection(
                spec.name for spec in entry.inputs
            ):
                if name in given:
                    raise VerificationError(
                        f"input {name!r} of graph {entry.entry!r} is an output of the graphs {given[name]!r} and "
                        f"{feeder.entry!r}: rename one of them"
                    )
                given[name] = feeder.entry


def _check_tensor(program: Program, target: str, node: fx.Node) -> None:
    if target not in program.parameters and target not in program.buffers:
        raise VerificationError(f"node {node.name} reads {target!r}, which the program does not have")
    found = node.meta.get("val")
    real = program.tensor(target)
    if isinstance(found, torch.Tensor) and (
        tuple(found.shape) != tuple(real.shape) or found.dtype != real.dtype
    ):
        raise VerificationError(
            f"node {node.name} expects {target!r} as {found.dtype}{list(found.shape)}, but it is {real.dtype}{list(real.shape)}"
        )


def _check_call(node: fx.Node) -> None:
    if not isinstance(node.target, torch._ops.OpOverload):
        if getattr(node.target, "__module__", "") not in SCALAR_MODULES:
            raise VerificationError(f"node {node.name} calls {node.target}, which is not an operator")
        return
    if node.target._schema.is_mutable and not traits_of(node).writes:
        raise VerificationError(f"node {node.name} calls {node.target}, which writes in place")
    if "val" not in node.meta:
        raise VerificationError(f"node {node.name} has no shape metadata: add nodes with program.edit()")


def _check_outputs(program: Program, graph: fx.Graph) -> None:
    values: Any = output_node(graph).args[0]
    if len(values) != len(program.outputs) + len(program.writes):
        raise VerificationError(
            f"graph {program.entry!r} returns {len(values)} values, but its signature declares {len(program.outputs) + len(program.writes)}"
        )
    for spec, node in zip(program.outputs, values):
        found = node.meta.get("val")
        if isinstance(found, torch.Tensor) and (
            found.dtype != spec.dtype or len(found.shape) != len(spec.shape)
        ):
            raise VerificationError(f"output {spec} is now {found.dtype}{list(dims(program, found))}")
