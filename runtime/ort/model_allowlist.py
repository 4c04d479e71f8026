"""Check an untrusted ONNX file before ONNX Runtime reads it: listed operators in order, bounded memory, no division by zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bmgraph.errors import BundleError
from bmgraph.runtime.node_times import all_nodes
from bmgraph.runtime.ort.allowed_operators import check_operator
from bmgraph.runtime.ort.block_codes_allowlist import check_block_codes
from bmgraph.runtime.ort.branches_allowlist import branches, check_branches, check_condition
from bmgraph.runtime.ort.constant_budget import ConstantBudget
from bmgraph.runtime.ort.divisors import Divisors
from bmgraph.runtime.ort.model_fields import check_fields
from bmgraph.runtime.ort.moe_allowlist import MIXTURES, check_mixture
from bmgraph.runtime.ort.weight_check import stored_size

_MAX_OPSET = 26
_FREE_NODES = 10_000
_BYTES_PER_NODE = 500
"""A model may have _FREE_NODES, and one more for each so many bytes: ONNX Runtime takes a few thousand bytes for each."""


def admit(
    file: Path, data: bytes, weights: tuple[str, int] | None, contrib: bool = True
) -> tuple[list[str], list[str]]:
    """Check a model, the contents of `file`; returns the names of its inputs and outputs.

    `weights` are the name and the size of the only other file that may hold weights, None for no such file. `contrib`: it
    may call operators of ONNX Runtime's own domain. Raises BundleError, naming the node or weight, for anything that is not
    allowed.
    """
    import onnx
    from google.protobuf.message import DecodeError

    check_fields(file, data)
    try:
        model = onnx.ModelProto.FromString(data)
    except (DecodeError, ValueError) as error:
        raise BundleError(f"{file} is not a valid ONNX model: {str(error)[:200]}") from error
    opset = _standard_opset(file, model, contrib)
    graph = model.graph
    for node in graph.node:
        check_branches(node)
    nodes = list(all_nodes(graph))
    own = next((node for node in nodes if node.domain == "com.microsoft"), None)
    if own is not None and not contrib:
        raise BundleError(
            f"node {own.name!r} calls com.microsoft.{own.op_type}, which this engine does not run"
        )
    most = _FREE_NODES + len(data) // _BYTES_PER_NODE
    if len(nodes) > most:
        raise BundleError(f"{file} has {len(nodes)} nodes: at most {most} are allowed in a file of its size")
    values = {item.name: item for item in graph.initializer}
    if len(values) != len(graph.initializer):
        raise BundleError(f"{file} names a weight twice")
    sizes = {item.name: stored_size(item, weights) for item in graph.initializer}
    _check_order(file, graph)
    _check_nodes(graph, opset, ConstantBudget(values, sizes), Divisors(model), values)
    return [item.name for item in graph.input], [item.name for item in graph.output]


def _standard_opset(file: Path, model: Any, contrib: bool) -> int:
    """The version of the standard operators; raises BundleError for unknown operator sets."""
    versions = {}
    known = ("", "ai.onnx", "com.microsoft") if contrib else ("", "ai.onnx")
    for opset in model.opset_import:
        if opset.domain not in known or not 1 <= opset.version <= _MAX_OPSET:
            raise BundleError(
                f"{file} uses operator set {opset.domain!r} {opset.version}, which is not allowed"
            )
        versions[opset.domain.removeprefix("ai.onnx")] = opset.version
    return int(versions.get("", 1))


def _check_order(file: Path, graph: Any) -> None:
    """Raise BundleError unless each value is made once, before it is read."""
    known = {"", *(item.name for item in graph.initializer)}
    for item in graph.input:
        if item.name in known:
            raise BundleError(f"{file} has the input {item.name!r} twice, or as a weight")
        known.add(item.name)
    _check_values(file, graph, known, set(known))


def _check_values(file: Path, graph: Any, known: set[str], made: set[str]) -> None:
    """The same for the nodes and outputs of a graph that reads values `known` before it; `made` are all names of the file so far."""
    for node in graph.node:
        for name in node.input:
            if name not in known:
                raise BundleError(
                    f"node {node.name!r} ({node.op_type}) reads {name!r}, which nothing before it makes"
                )
        for branch in branches(node):
            _check_values(file, branch, set(known), made)
        for name in node.output:
            if name and name in made:
                raise BundleError(
                    f"node {node.name!r} ({node.op_type}) makes {name!r}, which is there already"
                )
            known.add(name)
            made.add(name)
    for item in graph.output:
        if not item.name or item.name not in known:
            raise BundleError(f"{file} gives the output {item.name!r}, which no node makes")


def _check_nodes(
    graph: Any, opset: int, budget: ConstantBudget, divisors: Divisors, values: dict[str, Any]
) -> None:
    inputs = {item.name: _fixed_sizes(item) for item in graph.input}
    clips: dict[str, Any] = {}
    dynamic = {name for name, fixed in inputs.items() if not all(fixed)}
    made: dict[str, Any] = {}
    for node in all_nodes(graph):
        check_operator(node, opset)
        if node.op_type == "If":
            check_condition(node, made, dynamic)
            dynamic.update(node.output)
        made.update(dict.fromkeys(node.output, node))
        if node.op_type in MIXTURES:
            check_mixture(node, values)
        if node.op_type == "Clip" and not node.domain:
            clips[node.output[0]] = node
        check_block_codes(node, values, clips)
        divisors.follow(node)
        if dynamic.intersection(node.input):
            dynamic.update(node.output)
        known_shape = node.op_type in ("Shape", "Size") and _is_folded(node, dynamic, inputs)
        budget.follow(node, known_shape)


def _fixed_sizes(item: Any) -> list[bool]:
    """Which axes of an input have a fixed size; one False if the file gives no shape."""
    if not item.type.HasField("tensor_type") or not item.type.tensor_type.HasField("shape"):
        return [False]
    return [dim.HasField("dim_value") for dim in item.type.tensor_type.shape.dim]


def _is_folded(node: Any, dynamic: set[str], inputs: dict[str, list[bool]]) -> bool:
    """Whether ONNX Runtime knows the sizes that a Shape or Size node returns, and so folds them as constants."""
    name = node.input[0] if node.input else ""
    if name not in dynamic:
        return True
    if name not in inputs:
        return False
    bounds = {item.name: item.i for item in node.attribute}
    return node.op_type == "Shape" and all(inputs[name][bounds.get("start", 0) : bounds.get("end")])
