"""The deltas of a family for a folder that holds one of each module: what such a folder cannot hold is refused."""

from __future__ import annotations

from bmgraph.deltas.family import Delta
from bmgraph.deltas.linear_family import LinearFamily
from bmgraph.errors import InputError
from bmgraph.ir.program import Program


def one_each(family: LinearFamily, program: Program) -> dict[str, Delta]:
    """Module -> its delta.

    Raises InputError for several deltas on one module, for deltas that do not share what those of one run of a pass share, for
    options that differ, and as `LinearFamily.by_module`.
    """
    by_module = family.by_module(program)
    every = [delta for deltas in by_module.values() for delta in deltas]
    for key in family.shared:
        if len({delta.tensors[key] for delta in every}) > 1:
            raise InputError(
                f"deltas of the family {family.name!r} were added in several runs of its pass and do not share one {key!r}, and a "
                "folder holds one: save the whole program"
            )
    for module, deltas in by_module.items():
        if len(deltas) > 1:
            raise InputError(
                f"{module} has {len(deltas)} deltas of the family {family.name!r}, and a folder holds one: merge one of them, "
                "or save the whole program"
            )
    if any(delta.options != every[0].options for delta in every):
        raise InputError(
            f"deltas of the family {family.name!r} have different options, and a folder holds one for all: save the whole "
            "program"
        )
    return {module: delta for module, (delta,) in by_module.items()}
