"""The families of deltas: built-in ones, and those that installed packages register."""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from importlib import import_module

from torch import fx

from bmgraph.deltas.family import Delta, DeltaFamily
from bmgraph.errors import PassError
from bmgraph.ir.node_role import is_delta, role_of

FAMILIES: dict[str, str] = {
    "ClassRowsFamily": "bmgraph.deltas.class_rows",
    "WholeModules": "bmgraph.deltas.whole_modules",
    "LowRank": "bmgraph.deltas.low_rank",
    "DoRAFamily": "bmgraph.deltas.dora",
    "IA3Family": "bmgraph.deltas.ia3",
    "AdapterFamily": "bmgraph.deltas.adapter",
    "ParallelAdapterFamily": "bmgraph.deltas.parallel_adapter",
    "LowRankAdapterFamily": "bmgraph.deltas.low_rank_adapter",
    "CompacterFamily": "bmgraph.deltas.compacter",
    "BitFitFamily": "bmgraph.deltas.bitfit",
    "VeRAFamily": "bmgraph.deltas.vera",
    "PrefixFamily": "bmgraph.deltas.prefix",
    "SoftTokenFamily": "bmgraph.deltas.soft_tokens",
    "SoftPrompts": "bmgraph.deltas.soft_prompt_family",
}
"""Class name of a family -> the module that defines it."""

ENTRY_POINTS = "bmgraph.deltas"
"""The entry-point group in which other packages register families: `name = module:Class`."""


def families() -> tuple[DeltaFamily, ...]:
    """One object of each family. Raises PassError where two have the same name, role or type of folder.

    A package that is installed or removed while the process runs is noticed by the time of change of its folder.
    """
    state = tuple((folder, _changed(folder)) for folder in sys.path)
    return _families(ENTRY_POINTS, tuple(FAMILIES.items()), state)


def _changed(folder: str) -> int:
    """When a folder of packages was changed last; 0 if there is none."""
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=1)
def _families(
    group: str, built_in: tuple[tuple[str, str], ...], state: tuple[tuple[str, int], ...]
) -> tuple[DeltaFamily, ...]:
    """The families in a state of the folders of packages: to look for those that are installed takes milliseconds."""
    from importlib.metadata import entry_points

    kinds = [getattr(import_module(module), name) for name, module in built_in]
    kinds += [point.load() for point in entry_points(group=group)]
    made: list[DeltaFamily] = [kind() for kind in kinds]
    taken: dict[str, DeltaFamily] = {}
    for family in made:
        kind = [f"type {family.peft_type} {family.variant}".strip()] if family.peft_type else []
        kind += [f"type {other}" for other in family.also_read]
        for own in (f"name {family.name}", *(f"role {role}" for role in family.roles), *kind):
            other = taken.setdefault(own, family)
            if other is not family:
                raise PassError(
                    f"two families of deltas have the {own}: {_where(other)} and {_where(family)}; uninstall the package of "
                    "one, or rename it there"
                )
    return tuple(made)


def deltas_of(graph: fx.Graph) -> list[Delta]:
    """All deltas of a graph, of whatever family, in the order of their totals: of several on one linear the innermost first.

    Raises PassError for nodes of a delta that is of no known family.
    """
    known = {role for family in families() for role in family.roles}
    for node in graph.nodes:
        if is_delta(node) and role_of(node) not in known:
            raise PassError(
                f"the delta on {node.meta.get('site') or node.name} is of no family: its nodes have the role "
                f"{role_of(node)!r}, and known are {', '.join(sorted(known))}; install the package that made it, which registers "
                f"its family as an entry point of {ENTRY_POINTS!r}"
            )
    found = {delta.total: delta for family in families() for delta in family.recognise(graph)}
    return [found[node] for node in graph.nodes if node in found]


def _where(family: DeltaFamily) -> str:
    return f"{type(family).__module__}.{type(family).__name__}"
