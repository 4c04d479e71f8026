"""Joins the graphs of a program into one dataflow, on which passes run; `split_graphs.py` splits it again.

In the one graph a tensor has one reader with its uses in all graphs, and what one graph hands to another, by name, is one
value: whatever walks a graph then sees all of them. `aten.clone` with the metadata HANDED marks where to split.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from bmgraph.errors import InputError
from bmgraph.ir.graph_order import running_order
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import propagate
from bmgraph.ir.signature import Signature
from bmgraph.ir.symbolic_dim import is_name
from bmgraph.ir.tensor_spec import Dim, Range, TensorSpec

HANDED = "handed"
"""Key in the metadata of a value that one graph hands to others: the name of the output and of their input."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Part:
    """What one graph was before it was joined with others.

    `sizes` are its dynamic sizes by name -> what they are in the joined graph, `outputs` the names of its outputs there,
    `fed` the inputs that other graphs give.
    """

    name: str
    signature: Signature
    sizes: Mapping[str, Dim]
    outputs: tuple[str, ...]
    fed: frozenset[str]


def join(program: Program) -> tuple[Program, tuple[Part, ...]]:
    """The program as one graph, under the name of its entry, and what its graphs were: nothing for a program of one graph.

    It takes the inputs that no graph gives and returns the outputs of all graphs, those of the entry first. Inputs of the
    same name are one input. Raises InputError where graphs do not fit each other: an input of another dtype or size, or a
    buffer that two graphs write.
    """
    if len(program.graphs) == 1:
        return program, ()
    joined = program.clone()
    inputs, parts = _join_signatures(program)
    order = sorted(parts, key=lambda part: part.name != program.entry)
    signature = _signature(program, order, inputs)
    graph = fx.Graph()
    values = {spec.name: graph.placeholder(spec.name) for spec in signature.inputs}
    tensors: dict[str, fx.Node] = {}
    returned: dict[str, fx.Node] = {}
    written: dict[str, fx.Node] = {}
    handed = {name for part in parts for name in part.fed}
    for part in parts:
        copies: dict[fx.Node, fx.Node] = {}
        source = program.graphs[part.name]
        for node in source.nodes:
            if node.op == "placeholder":
                copies[node] = values[str(node.target)]
                if copies[node].op == "placeholder":
                    copies[node].meta |= {key: value for key, value in node.meta.items() if key != "val"}
            elif node.op == "get_attr":
                copies[node] = tensors.get(str(node.target)) or _copy(graph, node, copies)
                tensors[str(node.target)] = copies[node]
            elif node.op == "call_function":
                copies[node] = _copy(graph, node, copies)
        results: Any = output_node(source).args[0]
        for spec, name, node in zip(part.signature.outputs, part.outputs, results):
            found = copies[node]
            if spec.name in handed:
                found = values[spec.name] = graph.call_function(torch.ops.aten.clone.default, (found,))
                found.meta = {"scope": copies[node].meta.get("scope", ""), HANDED: spec.name}
            returned[name] = found
        for name, node in zip(part.signature.writes, results[len(part.outputs) :]):
            if name in written:
                raise InputError(f"two graphs write the buffer {name!r}: give each a buffer of its own")
            written[name] = copies[node]
    graph.output((*(returned[spec.name] for spec in signature.outputs), *written.values()))
    joined.graphs = {program.entry: graph}
    joined.signatures = {program.entry: replace(signature, writes=tuple(written))}
    propagate(joined, everything=True)
    return joined, parts


def _copy(graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    copied = graph.node_copy(node, lambda item: copies[item])
    copied.meta = {key: value for key, value in node.meta.items() if key not in ("val", HANDED)}
    return copied


def _join_signatures(program: Program) -> tuple[dict[str, TensorSpec], tuple[Part, ...]]:
    """The inputs of the joined graph, by name, and its parts in running order."""
    inputs: dict[str, TensorSpec] = {}
    given: dict[str, TensorSpec] = {}
    parts: list[Part] = []
    taken: set[str] = set()
    named: set[str] = {spec.name for spec in program.outputs}
    for entry in running_order(program):
        fed = {spec.name for feeder in entry.feeders() for spec in feeder.outputs}
        sizes: dict[str, Dim] = {}
        for spec in entry.inputs:
            known = given[spec.name] if spec.name in fed else inputs.get(spec.name)
            if known is not None:
                _match(entry.entry, spec, known, sizes)
        for spec in entry.inputs:
            for dim in spec.shape:
                if is_name(dim) and dim not in sizes:
                    sizes[str(dim)] = _fresh(str(dim), taken)
            if spec.name not in fed:
                known = inputs.get(spec.name)
                shape = tuple(renamed(dim, sizes) for dim in spec.shape)
                inputs[spec.name] = replace(known or spec, shape=shape, values=_narrower(spec, known))
        outputs = []
        for spec in entry.outputs:
            given[spec.name] = replace(spec, shape=tuple(renamed(dim, sizes) for dim in spec.shape))
            own = entry.entry == program.entry or spec.name not in named
            outputs.append(spec.name if own else _fresh(f"{entry.entry}_{spec.name}", set(named)))
            named.add(outputs[-1])
        takes = frozenset(fed.intersection(spec.name for spec in entry.inputs))
        parts.append(Part(entry.entry, program.signatures[entry.entry], sizes, tuple(outputs), takes))
    return inputs, tuple(parts)


def _match(graph: str, spec: TensorSpec, known: TensorSpec, sizes: dict[str, Dim]) -> None:
    """Note what the sizes of an input are in the joined graph, where it is `known` from another one."""
    fits = spec.dtype == known.dtype and len(spec.shape) == len(known.shape)
    for own, there in zip(spec.shape, known.shape):
        fits &= (
            sizes.setdefault(str(own), there) == there
            if is_name(own)
            else isinstance(own, str) or own == there
        )
    if not fits:
        raise InputError(
            f"graph {graph!r} takes {spec}, and another graph has it as {known}: graphs that share a value must agree about "
            "its dtype and sizes"
        )


def _narrower(spec: TensorSpec, known: TensorSpec | None) -> tuple[int, int | None] | None:
    """The values that both graphs take of an input that they share."""
    found = [item.values for item in (spec, known) if item is not None and item.values is not None]
    if not found:
        return None
    highs = [high for _, high in found if high is not None]
    return max(low for low, _ in found), min(highs, default=None)


def _fresh(name: str, taken: set[str]) -> str:
    """The name, or name_2, name_3, ...: the first that is free, which is then taken."""
    count, candidate = 1, name
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def renamed(dim: Dim, names: Mapping[str, Dim]) -> Dim:
    """A size with other names in it."""
    if isinstance(dim, int) or dim in names:
        return names.get(dim, dim) if isinstance(dim, str) else dim

    def other(found: re.Match[str]) -> str:
        new = names.get(found.group(), found.group())
        return f"({new})" if isinstance(new, str) and not is_name(new) else str(new)

    return _NAME.sub(other, dim)


def _signature(program: Program, parts: list[Part], inputs: Mapping[str, TensorSpec]) -> Signature:
    """The signature of the joined graph, without the buffers that it writes."""
    own = [part.signature for part in parts]
    names = [spec.name for item in own for spec in item.inputs if spec.name in inputs]
    outputs = [
        replace(spec, name=name, shape=tuple(renamed(dim, part.sizes) for dim in spec.shape))
        for part in parts
        for name, spec in zip(part.outputs, part.signature.outputs)
    ]
    losses = [
        name
        for part in parts
        for name, spec in zip(part.outputs, part.signature.outputs)
        if spec.name in part.signature.losses
    ]
    return Signature(
        inputs=tuple(inputs[name] for name in dict.fromkeys(names)),
        outputs=tuple(outputs),
        ranges=_ranges(parts),
        losses=tuple(losses),
        example={
            name: value for item in reversed(own) for name, value in item.example.items() if name in inputs
        },
        fixed=tuple(dict.fromkeys(line for item in own for line in item.fixed)),
        narrower=tuple(dict.fromkeys(line for item in own for line in item.narrower)),
        ignored=tuple(dict.fromkeys(name for item in own for name in item.ignored if name not in inputs)),
        unproven=tuple(dict.fromkeys(line for item in own for line in item.unproven)),
        cache=program.cache,
    )


def _ranges(parts: list[Part]) -> dict[str, Range]:
    """What all graphs take of each size."""
    found: dict[str, Range] = {}
    for part in parts:
        for name, own in part.signature.ranges.items():
            size = renamed(name, part.sizes)
            if isinstance(size, str):
                found[size] = _both(found.get(size, Range(0)), own)
    return found


def _both(one: Range, other: Range) -> Range:
    highs = [high for high in (one.high, other.high) if high is not None]
    return Range(max(one.low, other.low), min(highs, default=None))
