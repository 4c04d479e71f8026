"""Matches the modules that a loaded delta changes to the linears of a program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import fx

from bmgraph.analysis.site_filter import nearest
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.sites import Linear
from bmgraph.analysis.weight_sites import site_path
from bmgraph.deltas.family import Change, Part
from bmgraph.errors import MisplacedError
from bmgraph.ir.program import Program

Sizes = tuple[int | None, int | None]
"""Outputs and inputs of the linear that a change fits; None where any number does."""


def match_modules(program: Program, part: Part, sizes: Callable[[Change], Sizes]) -> dict[str, Linear]:
    """The linear for each module path of a loaded delta, with the uses that the module has.

    The weight of a linear may be tied to that of another module: a delta changes only the uses in its own module.
    Raises MisplacedError where the delta was trained on another backbone: where a module is missing or a shape differs.
    """
    linears = {item.name: item for item in find(program).linears}
    known = {site_path(name): item for name, item in linears.items()}
    for alias, name in program.ties.items():
        if name in linears:
            known[site_path(alias)] = linears[name]
    matched: dict[str, Linear] = {}
    for module, change in part.changes.items():
        linear = known.get(module)
        if linear is None:
            near = nearest(module, list(known))
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise MisplacedError(
                f"the delta in {part.path} changes {module!r}, which is not a linear of the program{hint}"
            )
        expected = (linear.out_features, linear.in_features)
        found = tuple(
            size if mine is None else mine for mine, size in zip(sizes(change), expected, strict=True)
        )
        if found != expected:
            raise MisplacedError(
                f"the delta in {part.path} is for another backbone: at {module} it changes a weight of "
                f"{found[0]} x {found[1]}, the program's is {expected[0]} x {expected[1]}"
            )
        matched[module] = _of_module(program, linear, module)
    by_linear = {linear: module for module, linear in matched.items()}
    for module, linear in matched.items():
        if by_linear[linear] != module:
            raise MisplacedError(
                f"the delta in {part.path} changes {module!r} and {by_linear[linear]!r}, which are one linear of the "
                "program: the uses of each cannot be told apart"
            )
    return matched


def module_name(program: Program, site: str, linear: fx.Node) -> str | None:
    """The module whose `weight` a linear multiplies by; None if it is not the weight of a module.

    A tied weight has several names: the one of the linear's own module comes first.
    """
    names = [site, *(alias for alias, name in program.ties.items() if name == site)]
    paths = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    here = [path for path in paths if path == linear.meta.get("scope")]
    return next(iter(here or paths), None)


def _of_module(program: Program, linear: Linear, module: str) -> Linear:
    """The linear with the uses in a module; with all uses where its weight has no other name, or none tells its module."""
    tied = {linear.name, *(alias for alias, name in program.ties.items() if name == linear.name)}
    if len(tied) == 1:
        return linear
    nodes = {graph: {node.name: node for node in nodes.nodes} for graph, nodes in program.graphs.items()}
    scopes = {use: str(nodes[use.graph][use.node].meta.get("scope")) for use in linear.uses}
    own = tuple(use for use in linear.uses if scopes[use] == module)
    known = {site_path(name) for name in tied} & set(scopes.values())
    if not own and known:
        raise MisplacedError(
            f"a delta changes {module!r}, whose weight only {', '.join(sorted(known))} multiplies by: rename it"
        )
    return replace(linear, uses=own) if own else linear
