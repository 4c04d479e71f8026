"""The program whose removed units are zero: what a shrunk program must compute."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from bmgraph.ir.program import Program
from bmgraph.ops.traits import traits_of


def silenced(before: Program, after: Program, sites: Iterable[Sequence[str]]) -> Program:
    """A copy of `before` in which all parts of tensors that `after` lacks are zero.

    `sites` are the tensors of each site; which units are gone is found by comparing the tensors themselves.
    """
    copy = before.clone()
    for names in sites:
        kept: dict[tuple[int, int], torch.Tensor] = {}
        for name in sorted(names, key=lambda name: -_distinct(before, name)):
            old, new = before.tensor(name), after.tensors().get(before.ties.get(name, name))
            if new is None or new.shape == old.shape or new.dim() != old.dim() or old.dtype == torch.int64:
                continue
            dim = next(dim for dim in range(old.dim()) if old.shape[dim] != new.shape[dim])
            sizes = (old.shape[dim], new.shape[dim])
            found = kept.get(sizes)
            if found is None or not torch.equal(old.index_select(dim, found), new):
                found = _subsequence(old.movedim(dim, 0), new.movedim(dim, 0))
            if found is None:
                continue  # no part of the old tensor: the outputs tell
            kept.setdefault(sizes, found)
            gone = torch.ones(old.shape[dim], dtype=torch.bool)
            gone[found] = False
            value = old.clone()
            value.movedim(dim, 0)[gone.to(old.device)] = 0
            table = copy.parameters if before.ties.get(name, name) in copy.parameters else copy.buffers
            table[before.ties.get(name, name)] = value
    return copy


def depends_on_count(before: Program, after: Program) -> str:
    """An operator of `before` that runs over units of which `after` has fewer; empty if there is none."""
    for node, other in _same_calls(before, after):
        if _last_size(node) != _last_size(other):
            return str(node.meta.get("scope") or node.name)
    return ""


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
