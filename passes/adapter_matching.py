"""Read a saved adapter and match its modules to the linears of a program."""

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


def load_adapter(context: Context, name: str) -> Adapter:
    """The adapter in the folder that resource `name` gives.

    History keeps a digest of the adapter's contents, not of its path. Raises ResourceError where the resource is not a
    path, BundleError where the folder is not a valid adapter.
    """
    path = context.resource(name)
    if not isinstance(path, (str, os.PathLike)):
        raise ResourceError(
            f"resource {name!r} is a {type(path).__name__}: give the path of an adapter folder"
        )
    adapter = read_adapter(Path(path))
    context.digests[name] = digest(
        {module: [change.a, change.b, change.scale] for module, change in adapter.changes.items()}
    )
    return adapter


def match_adapter(program: Program, adapter: Adapter) -> dict[str, Linear]:
    """The linear for each module path of an adapter.

    Raises MisplacedError where the adapter was trained on another backbone: where the fingerprint differs, a module is
    missing or a shape differs.
    """
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
    matched: dict[str, Linear] = {}
    for module, change in adapter.changes.items():
        linear = known.get(module)
        if linear is None:
            near = nearest(module, list(known))
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise MisplacedError(
                f"the delta in {adapter.path} changes {module!r}, which is not a linear of the program{hint}"
            )
        found, expected = (change.b.shape[0], change.a.shape[1]), (linear.out_features, linear.in_features)
        if found != expected:
            raise MisplacedError(
                f"the delta in {adapter.path} is for another backbone: at {module} it changes a weight of "
                f"{found[0]} x {found[1]}, the program's is {expected[0]} x {expected[1]}"
            )
        matched[module] = linear
    return matched
