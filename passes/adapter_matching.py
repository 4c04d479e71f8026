"""A saved delta and the program that it is put on: where it comes from, and whether the backbone is its own."""

from __future__ import annotations

import os
from pathlib import Path

from bmgraph.analysis.site_filter import nearest
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.sites import Linear
from bmgraph.analysis.weight_sites import site_path
from bmgraph.deltas.peft_format import Adapter, read_adapter
from bmgraph.errors import MisplacedError, ResourceError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.utils.digest import digest


def given_adapter(context: Context, name: str) -> Adapter:
    """The adapter in the folder that a resource names; its contents, not its place, are what history keeps a digest of."""
    path = context.resource(name)
    if not isinstance(path, (str, os.PathLike)):
        raise ResourceError(
            f"resource {name!r} is a {type(path).__name__}: give the path of an adapter's folder"
        )
    adapter = read_adapter(Path(path))
    context.digests[name] = digest(
        {module: [change.a, change.b, change.scale] for module, change in adapter.changes.items()}
    )
    return adapter


def fit(program: Program, adapter: Adapter) -> dict[str, Linear]:
    """The linear of each of an adapter's modules; raises MisplacedError where its backbone is another one."""
    if adapter.backbone and program.fingerprint and adapter.backbone != program.fingerprint:
        raise MisplacedError(
            f"the delta in {adapter.path} was trained on another backbone ({adapter.backbone[:12]}, this one is "
            f"{program.fingerprint[:12]}): load it on the model that it was trained on"
        )
    linears = {item.name: item for item in find(program).linears}
    known = {site_path(name): item for name, item in linears.items()}
    for alias, name in program.ties.items():
        if name in linears:
            known[site_path(alias)] = linears[name]
    fitted: dict[str, Linear] = {}
    for module, change in adapter.changes.items():
        linear = known.get(module)
        if linear is None:
            near = nearest(module, list(known))
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise MisplacedError(
                f"the delta in {adapter.path} changes {module!r}, which is no linear of the program{hint}"
            )
        found, wanted = (change.b.shape[0], change.a.shape[1]), (linear.out_features, linear.in_features)
        if found != wanted:
            raise MisplacedError(
                f"the delta in {adapter.path} is for another backbone: at {module} it changes a weight of "
                f"{found[0]} x {found[1]}, the program's is {wanted[0]} x {wanted[1]}"
            )
        fitted[module] = linear
    return fitted
