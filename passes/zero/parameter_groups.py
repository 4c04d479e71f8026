"""Group parameters into units: the parameters that a step needs at the same time, those of one layer."""

from __future__ import annotations

from torch import fx

from bmgraph.analysis.interpreter import reads_no_input
from bmgraph.analysis.structure.finder import find
from bmgraph.ir.program import Program, tensor_nodes


def units(program: Program) -> dict[str, str]:
    """The unit of every parameter: the path of its layer, or its own name where it belongs to no layer.

    A parameter belongs to a layer if it is one of the layer's sites, or if all its readers lie between the first and last
    read of the parameters of these sites (those of a delta or a relative position bias).
    """
    structure = find(program)
    layers: dict[str, set[str]] = {}
    for layer in structure.layers:
        for site in layer.sites:
            layers.setdefault(site, set()).add(layer.path or site)
    uses = _uses(program)
    unit_of: dict[str, str] = {}
    for name in uses:
        found = layers.get(structure.members.get(name, name), set())
        if len(found) == 1:
            unit_of[name] = next(iter(found))
    spans: dict[str, tuple[int, int]] = {}
    for name, path in unit_of.items():
        begin, end = spans.get(path, (uses[name][0], uses[name][1]))
        spans[path] = min(begin, uses[name][0]), max(end, uses[name][1])
    for name, (begin, end) in uses.items():
        enclosing = [path for path, span in spans.items() if span[0] <= begin and end <= span[1]]
        if name not in unit_of and len(enclosing) == 1:
            unit_of[name] = enclosing[0]
    return {name: unit_of.get(name, name) for name in program.parameters}


def _uses(program: Program) -> dict[str, tuple[int, int]]:
    """Index in the main graph of the first and last reader of each parameter that is not itself made of parameters."""
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    found: dict[str, tuple[int, int]] = {}
    for name, node in tensor_nodes(program.graph).items():
        if name in program.parameters:
            indices = [order[reader] for reader in _readers(node)]
            if indices:
                found[name] = min(indices), max(indices)
    return found


def _readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a parameter, directly or through expressions of parameters alone."""
    found: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user.op == "call_function" and reads_no_input(user):
                stack.append(user)
            else:
                found[user] = None
    return list(found)
