"""Read a saved adapter and match its modules to the linears of a program."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bmgraph.analysis.site_filter import nearest
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.sites import Linear
from bmgraph.analysis.weight_sites import site_path
from bmgraph.deltas.changed_weights import add_change
from bmgraph.deltas.low_rank import backbone_of
from bmgraph.deltas.peft_format import Adapter, read_adapter
from bmgraph.deltas.whole_modules import mask_of, train_whole
from bmgraph.errors import BundleError, MisplacedError, ResourceError
from bmgraph.ir.program import FORWARD, Program
from bmgraph.pass_manager.context import Context
from bmgraph.utils.digest import digest, fingerprint


def load_adapter(context: Context, name: str) -> Adapter:
    """The adapter in the folder that resource `name` gives, read once for a run of a pass and its proof.

    History keeps a digest of the adapter's contents, not of its path. Raises ResourceError where the resource is not a
    path, BundleError where the folder is not a valid adapter.
    """
    path = context.resource(name)
    if not isinstance(path, (str, os.PathLike)):
        raise ResourceError(
            f"resource {name!r} is a {type(path).__name__}: give the path of an adapter folder"
        )
    if name not in context.read:
        context.read[name] = read_adapter(Path(path))
    adapter: Adapter = context.read[name]
    contents: dict[str, Any] = {
        module: [change.a, change.b, change.scale] for module, change in adapter.changes.items()
    }
    context.digests[name] = digest({**contents, **adapter.whole, **adapter.copies})
    return adapter


def check_backbone(program: Program, adapter: Adapter) -> None:
    """Raise MisplacedError where an adapter was trained on other weights, or on a model that computes another thing with them.

    What a model computes is known of programs and adapters of this library, and compared as it was captured, before passes;
    where other versions captured it, a difference is a warning.
    """
    if adapter.backbone and program.fingerprint and adapter.backbone != program.fingerprint:
        raise MisplacedError(
            f"the delta in {adapter.path} was trained on another backbone ({adapter.backbone[:12]}, this one is "
            f"{program.fingerprint[:12]}): load it on the model that it was trained on"
        )
    then, now = adapter.computation, program.computation
    difference = now.difference(then) if then and now else ""
    if not difference:
        return
    if then.versions == now.versions:
        raise MisplacedError(
            f"the delta in {adapter.path} was trained on a model with equal weights that computes another thing with them "
            f"({difference}): load it on the model that it was trained on, with the same configuration"
        )
    warnings.warn(
        f"the delta in {adapter.path} was saved by other versions ({dict(then.versions)}, now {dict(now.versions)}), which "
        f"write what the model computes otherwise ({difference}): that it is the same model was not checked",
        stacklevel=2,
    )


def match_adapter(program: Program, adapter: Adapter) -> dict[str, Linear]:
    """The linear for each module path of an adapter, with the uses that the module has.

    The weight of a linear may be tied to that of another module: a delta changes only the uses in its own module.
    Raises MisplacedError where the adapter was trained on another backbone: where the fingerprint differs, a module is
    missing or a shape differs.
    """
    check_backbone(program, adapter)
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
        matched[module] = _of_module(program, linear, module)
    by_linear = {linear: module for module, linear in matched.items()}
    for module, linear in matched.items():
        if by_linear[linear] != module:
            raise MisplacedError(
                f"the delta in {adapter.path} changes {module!r} and {by_linear[linear]!r}, which are one linear of the "
                "program: the uses of each cannot be told apart"
            )
    return matched


def is_backbone_of(program: Program, adapters: Iterable[Adapter]) -> bool:
    """Whether adapters were trained on a program, as fingerprints, names and shapes tell."""
    try:
        for adapter in adapters:
            match_adapter(program, adapter)
            for name, value in {**adapter.copies, **adapter.whole}.items():
                _check_tensor(program, adapter, name, value)
                _check_mask(program, adapter, program.ties.get(name, name), value)
    except MisplacedError:
        return False
    return True


def adapter_changes(program: Program, adapter: Adapter) -> dict[str, torch.Tensor]:
    """The change f[out, in] of the weight of each linear that an adapter changes, by the name of its node."""
    changes: dict[str, torch.Tensor] = {}
    for module, linear in match_adapter(program, adapter).items():
        change = adapter.changes[module]
        product = change.scale * (change.b.float() @ change.a.float())
        for use in linear.uses:
            if use.graph == FORWARD:
                add_change(changes, use.node, product.to(program.device))
    return changes


def set_whole(program: Program, adapter: Adapter, context: Context) -> None:
    """Give the tensors that were trained whole their values, and those of which PEFT saved a copy.

    Raises MisplacedError where the program has no such tensor, or one of another shape.
    """
    for name, value in {**adapter.copies, **adapter.whole}.items():
        _check_tensor(program, adapter, name, value)
        old = program.tensor(name)
        value = value.to(device=old.device, dtype=old.dtype)
        if name in adapter.copies and (old.device.type == "meta" or torch.equal(value, old)):
            continue
        if name in adapter.whole and not adapter.tied:
            train_whole(program, [name])
        kept = program.ties.get(name, name)
        if adapter.tied and name in adapter.whole:
            program.trained_whole |= {kept}
        _check_mask(program, adapter, kept, value)
        table = program.buffers if kept in program.buffers else program.parameters
        table[kept] = value
        context.edited(name, f"set to the value in {adapter.path.name}")
        if name in adapter.copies:
            program.fingerprint = fingerprint(backbone_of(program))


def _check_tensor(program: Program, adapter: Adapter, name: str, value: torch.Tensor) -> None:
    if program.ties.get(name, name) not in program.tensors():
        near = nearest(name, [*program.tensors(), *program.ties])
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise MisplacedError(
            f"the delta in {adapter.path} holds a value of {name!r}, which is not a tensor of the program (a pass that "
            f"replaces weights, such as quantize, goes after it){hint}"
        )
    if program.tensor(name).shape != value.shape:
        raise MisplacedError(
            f"the delta in {adapter.path} is for another backbone: its {name} is {list(value.shape)}, the program's is "
            f"{list(program.tensor(name).shape)}"
        )
    old = program.tensor(name).dtype
    if value.dtype != old and not (value.is_floating_point() and old.is_floating_point):
        raise BundleError(
            f"the delta in {adapter.path} holds {name} as {value.dtype}, the program has it as {old}: no value of the one can be "
            "taken for one of the other; save the adapter in its model's type"
        )


def _check_mask(program: Program, adapter: Adapter, name: str, value: torch.Tensor) -> None:
    """Raise MisplacedError where the program would zero a part of a tensor that the adapter does not have as zero."""
    mask = mask_of(program, name)
    if mask is not None and value.device.type != "meta" and bool((value[~mask] != 0).any()):
        raise MisplacedError(
            f"the delta in {adapter.path} holds a value of {name!r}, of which this program is pruned to keep other elements "
            "than those that it has: load the delta before Prune, or exclude that module from Prune"
        )


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
