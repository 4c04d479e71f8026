"""Checks that a pass changed nothing that it did not name: tensors, what is frozen, ties, ranges, dropout, types of outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from bmgraph.errors import VerificationError
from bmgraph.ir.node_role import is_delta
from bmgraph.ir.pass_record import Edit
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import DTYPE_NAMES
from bmgraph.ops.traits import argument, traits_of

aten = torch.ops.aten

TENSORS, FROZEN, TIES, RANGES, DROPOUT, TYPES, TRAINING = (
    "tensors", "frozen", "ties", "ranges", "dropout", "types", "training",
)  # fmt: skip
ASPECTS = frozenset({TENSORS, FROZEN, TIES, RANGES, DROPOUT, TYPES, TRAINING})
"""What a pass may declare that it changes without naming it in its edits. tensors: parameters that train, and buffers, as
training does; frozen: which parameters train, at which factor of the learning rate, and what training does
beside its steps; ties; ranges of dynamic sizes; dropout: its places and probabilities; types:
dtypes and ranks of outputs; training: whether the program can train."""


@dataclass(frozen=True)
class Snapshot:
    """What a program was before a pass ran: tensors that a pass writes in place would change both programs."""

    versions: Mapping[str, int]

    @staticmethod
    def of(program: Program) -> Snapshot:
        """The version counters of all tensors."""
        return Snapshot(
            {
                name: 0 if tensor.is_inference() else tensor._version
                for name, tensor in program.tensors().items()
            }
        )


def check_unnamed(
    before: Program,
    after: Program,
    edits: Iterable[Edit],
    changes: Collection[str],
    snapshot: Snapshot,
) -> None:
    """Raise VerificationError, naming the first thing that a pass changed and does not name.

    `edits` name tensors, or modules that hold them. `changes` are the ASPECTS that the pass declares.
    """
    for name, tensor in before.tensors().items():
        if not tensor.is_inference() and tensor._version != snapshot.versions.get(name, tensor._version):
            raise VerificationError(
                f"it wrote into {name!r} in place, and so changed the program that it was given: assign a new tensor"
            )
    named = _named(before, edits)
    trained = (
        {name for name in before.tensors() if name not in before.frozen} if TENSORS in changes else set()
    )
    for name, why in _changed_tensors(before, after, named | trained):
        raise VerificationError(
            f"it changed {name!r} ({why}), which none of its edits names: report it with context.edited"
        )
    _check_tables(before, after, changes, named)
    if DROPOUT not in changes and not after.training:
        _check_dropout(before, after)
    if before.training == "" and after.training and TRAINING not in changes:
        raise VerificationError(f"the program can no longer train: {after.training}")


def _named(program: Program, edits: Iterable[Edit]) -> set[str]:
    """The tensors that edits name, by their name, an alias of it or the path of a module."""
    known: dict[str, str] = {**{name: name for name in program.tensors()}, **program.ties}
    found: set[str] = set()
    for edit in edits:
        for what in (edit.site, *edit.tensors):
            if what in known:
                found.add(known[what])
            else:
                found |= {kept for name, kept in known.items() if name.startswith(f"{what}.")}
    return found


def _changed_tensors(before: Program, after: Program, allowed: Collection[str]) -> Iterable[tuple[str, str]]:
    """The tensors that both programs have and that differ, each with how, but for those that may."""
    now = after.tensors()
    for name, old in before.tensors().items():
        new = now.get(name)
        if new is None or new is old or name in allowed:
            continue
        if new.dtype != old.dtype or new.shape != old.shape:
            yield name, f"{_text(old)} -> {_text(new)}"
        elif old.device.type != "meta" and not _same(old, new):
            yield name, "its values"


def _same(old: torch.Tensor, new: torch.Tensor) -> bool:
    if old.data_ptr() == new.data_ptr() and old.stride() == new.stride():
        return True
    if torch.equal(old, new):
        return True
    return (
        old.is_floating_point()
        and torch.equal(old.isnan(), new.isnan())
        and torch.equal(old.nan_to_num(), new.nan_to_num())
    )


def _text(tensor: torch.Tensor) -> str:
    return f"{DTYPE_NAMES.get(tensor.dtype, tensor.dtype)}{list(tensor.shape)}"


def _check_tables(before: Program, after: Program, changes: Collection[str], named: set[str]) -> None:
    """What is frozen, tied, and in range, as far as both programs have it."""
    if FROZEN not in changes:
        both = set(before.parameters) & set(after.parameters) - named
        for name in sorted(both):
            if (name in before.frozen) != (name in after.frozen):
                state = "frozen" if name in after.frozen else "trainable"
                raise VerificationError(
                    f"it made {name!r} {state}, which it does not declare (changes = 'frozen')"
                )
            if before.lr_factors.get(name) != after.lr_factors.get(name):
                raise VerificationError(
                    f"it changed the factor of the learning rate of {name!r}, which it does not declare (changes = 'frozen')"
                )
        for rule in before.step_rules:
            left = rule.among(set(after.tensors()))
            if left is not None and left not in after.step_rules:
                raise VerificationError(
                    f"it changed what training does with {left.read[0]!r} beside its steps, which it does not declare (changes = "
                    "'frozen')"
                )
    if TIES not in changes:
        for alias, name in before.ties.items():
            if name in after.parameters and after.ties.get(alias) != name and name not in named:
                raise VerificationError(f"it untied {alias!r} from {name!r}, which it does not declare")
    if RANGES not in changes:
        for size, bounds in before.ranges.items():
            if size in after.ranges and after.ranges[size] != bounds:
                raise VerificationError(
                    f"it changed the range of {size!r} from {bounds} to {after.ranges[size]}, which it does not declare"
                )
    if TYPES not in changes:
        now = {spec.name: spec for spec in after.outputs}
        for old in before.outputs:
            new = now.get(old.name)
            if new is not None and (new.dtype != old.dtype or len(new.shape) != len(old.shape)):
                raise VerificationError(f"output {old} became {new}")


def _check_dropout(before: Program, after: Program) -> None:
    """Dropout must be where and what it was, apart from that of deltas."""
    old, new = _dropouts(before), _dropouts(after)
    for item in (old - new).keys() | (new - old).keys():
        where, probability = item
        raise VerificationError(
            f"dropout of {probability} {f'in {where} ' if where else ''}is there {old[item]} times before the pass and "
            f"{new[item]} times after it, which it does not declare"
        )


def _dropouts(program: Program) -> Counter[tuple[str, object]]:
    """How often each dropout is there that is not a delta's, by the module that it is in and its probability."""
    found: Counter[tuple[str, object]] = Counter()
    for graph in program.graphs.values():
        for node in graph.nodes:
            drop = traits_of(node).drop
            share = argument(node, drop) if drop and not is_delta(node) else None
            if share:
                found[str(node.meta.get("scope") or ""), share] += 1
    return found
