"""Operators of other packages in files: a file names the packages that its program needs, and they are used in trust alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bmgraph.errors import BundleError
from bmgraph.ir.printer import target_text
from bmgraph.ir.program import Program
from bmgraph.ops.outside import find_outside, is_outside, normalized, outside_operators, outside_packages

PACKAGES = "packages"
"""Key of the packages that a program in a file needs."""

_PACKAGE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*\Z")
MOST_PACKAGES, LONGEST_NAME = 16, 100

Operators = Mapping[str, torch._ops.OpOverload]
"""Name in a file -> operator of another package."""


def needed_packages(program: Program) -> list[str]:
    """The packages whose operators a program calls; raises BundleError for an operator that no installed one adds."""
    targets = {node.target for graph in program.graphs.values() for node in graph.nodes}
    needed: set[str] = set()
    for target in filter(is_outside, targets):
        found = find_outside(target)
        if found is None:
            raise BundleError(
                f"operator {target_text(target)!r} cannot be saved: no installed package adds it by an entry point in the "
                "group 'bmgraph.operators', so nothing could load it"
            )
        needed.add(found[0])
    return sorted(needed)


def trusted_operators(trees: Sequence[Mapping[str, Any]], trusted: tuple[str, ...]) -> Operators:
    """The operators of the packages that programs in a file need, if all of these are trusted.

    Raises BundleError where one is not trusted, not installed, or adds no operators; only trusted ones are imported.
    """
    needed = sorted({name for tree in trees for name in _named(tree)})
    untrusted = [name for name in needed if name not in set(map(normalized, trusted))]
    if untrusted:
        given = "".join(f"{name!r}, " for name in needed).rstrip(" ")
        raise BundleError(
            f"the program calls operators of {', '.join(untrusted)}, which is code of other packages: if you trust it, install "
            f"it and load with bg.load(path, trust=({given}))"
        )
    missing = [name for name in needed if name not in outside_packages()]
    if missing:
        raise BundleError(
            f"the program calls operators of {', '.join(missing)}, but no installed package of that name adds operators: "
            "install it first"
        )
    return {target_text(item.call): item.call for name in needed for item in outside_operators(name)}


def _named(tree: Mapping[str, Any]) -> list[str]:
    names = tree.get(PACKAGES, [])
    valid = isinstance(names, list) and len(names) <= MOST_PACKAGES
    if not valid or not all(
        isinstance(name, str) and len(name) <= LONGEST_NAME and _PACKAGE.match(name) for name in names
    ):
        raise BundleError(f"{str(names)[:100]} is not a valid list of packages")
    return list(names)
