"""Which parameters a step needs together: those of one layer, or one alone."""

from __future__ import annotations

from torch import fx

from bmgraph.analysis.interpreter import reads_no_input
from bmgraph.analysis.structure.finder import find
from bmgraph.ir.program import Program, tensor_nodes


def units(program: Program) -> dict[str, str]:
    """The unit of every parameter: the path of its layer, or its own name where it belongs to no layer.

    A layer's are the parameters of its sites, and those that nothing outside of its part of the graph reads (a delta's,
    a relative position's).
    """
    structure = find(program)
    layers: dict[str, set[str]] = {}
    for layer in structure.layers:
        for site in layer.sites:
            layers.setdefault(site, set()).add(layer.path or site)
    uses = _uses(program)
    unit: dict[str, str] = {}
    for name in uses:
        found = layers.get(structure.members.get(name, name), set())
        if len(found) == 1:
            unit[name] = next(iter(found))
    spans: dict[str, tuple[int, int]] = {}
    for name, path in unit.items():
        begin, end = spans.get(path, (uses[name][0], uses[name][1]))
        spans[path] = min(begin, uses[name][0]), max(end, uses[name][1])
    for name, (begin, end) in uses.items():
        around = [path for path, span in spans.items() if span[0] <= begin and end <= span[1]]
        if name not in unit and len(around) == 1:
            unit[name] = around[0]
    return {name: unit.get(name, name) for name in program.parameters}


def _uses(program: Program) -> dict[str, tuple[int, int]]:
    """The first and last place in the main graph where each parameter meets something that is no parameter."""
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    found: dict[str, tuple[int, int]] = {}
    for name, node in tensor_nodes(program.graph).items():
        if name in program.parameters:
            places = [order[user] for user in _readers(node)]
            if places:
                found[name] = min(places), max(places)
    return found


def _readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a parameter, directly or in an expression of parameters alone."""
    found: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user.op == "call_function" and reads_no_input(user):
                stack.append(user)
            else:
                found[user] = None
    return list(found)
