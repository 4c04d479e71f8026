"""The program whose removed units are zero: what a shrunk program must compute."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.linears import tensors_of
from bmgraph.ir.node_role import NodeRole, has_role
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Dims
from bmgraph.ops.traits import traits_of
from bmgraph.utils.eight_bits import writable

aten = torch.ops.aten

Kept = dict[tuple[str, int], torch.Tensor]
"""(tensor, dimension) -> the indices along it that stay."""


def silenced(before: Program, after: Program, sites: Iterable[Sequence[str]]) -> Program | None:
    """A copy of `before` in which all parts of tensors that `after` lacks are zero, and norms see what is left alone.

    `sites` are the tensors of each site; which units are gone is found by comparing the tensors themselves. None where another
    operator than a norm runs over units of which `after` has fewer: zeros would count.
    """
    kept = _kept(before, after, sites)
    copy = before.clone()
    for (name, dim), found in kept.items():
        table = copy.parameters if name in copy.parameters else copy.buffers
        gone = torch.ones(table[name].shape[dim], dtype=torch.bool)
        gone[found] = False
        value = table[name].clone()
        writable(value).movedim(dim, 0)[gone.to(value.device)] = 0
        table[name] = value
    return copy if _norms_over_kept(before, after, kept, copy) else None


def _norms_over_kept(before: Program, after: Program, kept: Kept, copy: Program) -> bool:
    """Let the norms of `copy` whose features are fewer in `after` see those alone; False for another call over fewer."""
    nodes = {node.name: node for node in copy.graph.nodes}
    with copy.edit(by="proof") as editor:
        for node, other in _same_calls(before, after):
            if _last_size(node) == _last_size(other):
                continue
            found = _features(before, node, kept) if traits_of(node).dims is Dims.NORMED else None
            if found is None:
                return False
            norm = nodes[node.name]
            places = torch.full((_last_size(node),), len(found))
            places[found] = torch.arange(len(found))
            chosen, back = (
                editor.parameter(editor.fresh("proof_kept"), index.to(copy.device), frozen=True)
                for index in (found, places)
            )
            x, _, *rest = (
                editor.call(aten.index_select.default, item, -1, chosen, like=norm)
                if isinstance(item, fx.Node)
                else item
                for item in norm.args
            )
            target: Any = norm.target
            small = editor.call(target, x, [len(found)], *rest, like=norm)
            padded = editor.call(aten.constant_pad_nd.default, small, [0, 1], like=norm)
            editor.replace(norm, editor.call(aten.index_select.default, padded, -1, back, like=norm))
    return True


def _features(before: Program, norm: fx.Node, kept: Kept) -> torch.Tensor | None:
    """Which features of a norm stay, by its weight or bias; None without one, or where it runs over several dimensions."""
    sizes: Any = norm.args[1]
    if norm.kwargs or len(sizes) != 1:
        return None
    weights = [item for item in norm.args[2:] if isinstance(item, fx.Node)]
    names = [before.ties.get(name, name) for item in weights for name in tensors_of(item)]
    return next((kept[name, 0] for name in names if (name, 0) in kept), None)


def _kept(before: Program, after: Program, sites: Iterable[Sequence[str]]) -> Kept:
    """What stays of every tensor that has become smaller; nothing of one that is no part of what it was: the outputs tell.

    Not of gates: equal ones do not tell which are gone, and a gate of 0 is no log alpha of 0. What they scale is zero.
    """
    found: Kept = {}
    gates = {str(node.target) for node in before.graph.nodes if has_role(node, NodeRole.GATES)}
    pool: dict[tuple[int, int], list[torch.Tensor]] = {}
    several: dict[str, list[int]] = {}
    for names in sites:
        nearest: dict[tuple[int, int], torch.Tensor] = {}
        for name in sorted(
            (before.ties.get(item, item) for item in names), key=lambda name: -_distinct(before, name)
        ):
            old, new = before.tensor(name), after.tensors().get(name)
            if name in gates:
                continue
            if new is None or new.shape == old.shape or new.dim() != old.dim() or old.dtype == torch.int64:
                continue
            dims = [dim for dim in range(old.dim()) if old.shape[dim] != new.shape[dim]]
            if len(dims) > 1:
                several[name] = dims
                continue
            (dim,) = dims
            sizes = (old.shape[dim], new.shape[dim])
            places = nearest.get(sizes)
            if places is None or not torch.equal(old.index_select(dim, places), new):
                places = _subsequence(old.movedim(dim, 0), new.movedim(dim, 0))
            if places is not None:
                nearest.setdefault(sizes, places)
                pool.setdefault(sizes, []).append(places)
                found[name, dim] = places
    for name, dims in several.items():
        along = _along_several(before.tensor(name), after.tensors()[name], dims, pool)
        found.update({(name, dim): places for dim, places in along.items()})
        for dim, places in along.items():
            pool.setdefault((len(before.tensor(name).movedim(dim, 0)), len(places)), []).append(places)
    return found


def _along_several(
    old: torch.Tensor, new: torch.Tensor, dims: Sequence[int], pool: dict[tuple[int, int], list[torch.Tensor]]
) -> dict[int, torch.Tensor]:
    """What stays along several dimensions: along all but one of them what stays of some other tensor; empty if that is nothing."""
    for dim in dims:
        others = [item for item in dims if item != dim]
        for places in _unequal(pool.get((old.shape[dim], new.shape[dim]), [])):
            part = old.index_select(dim, places)
            if not others:
                if torch.equal(part, new):
                    return {dim: places}
            elif found := _along_several(part, new, others, pool):
                return {dim: places, **found}
        if not others:
            last = _subsequence(old.movedim(dim, 0), new.movedim(dim, 0))
            return {} if last is None else {dim: last}
    return {}


def _unequal(items: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [
        item for place, item in enumerate(items) if not any(torch.equal(item, one) for one in items[:place])
    ]


def _same_calls(before: Program, after: Program) -> list[tuple[fx.Node, fx.Node]]:
    """The calls that depend on counts, in both programs: in their order where none is gone, since a cut may give nodes other
    names; else by name."""
    old, new = (
        [node for node in program.graph.nodes if traits_of(node).depends_on_count]
        for program in (before, after)
    )
    if [node.target for node in old] == [node.target for node in new]:
        return list(zip(old, new))
    named = {node.name: node for node in new}
    return [(node, named[node.name]) for node in old if node.name in named]


def _last_size(node: Any) -> Any:
    value = node.args[0].meta.get("val") if node.args and hasattr(node.args[0], "meta") else None
    if not isinstance(value, torch.Tensor) or not value.dim():
        return None
    size = value.shape[-1]
    return size if isinstance(size, int) else str(size)


def _distinct(program: Program, name: str) -> int:
    """How many values of a tensor differ, at most: the more, the surer is what of it is gone."""
    tensor = program.tensor(name)
    return 0 if tensor.dtype == torch.bool else tensor.numel()


def _subsequence(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor | None:
    """The indices along axis 0 of `old` that give `new`, in order, the first ones that do; None if none do."""
    rows, wanted = (
        old.flatten(1) if old.dim() > 1 else old[:, None],
        new.flatten(1) if new.dim() > 1 else new[:, None],
    )
    found, place = [], 0
    for row in wanted:
        while place < len(rows) and not torch.equal(rows[place], row):
            place += 1
        if place == len(rows):
            return None
        found.append(place)
        place += 1
    return torch.tensor(found, device=old.device)
