"""Checks the update phase of a step after a pass: where values, gradients and states are, and what an update makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from bmgraph.errors import VerificationError
from bmgraph.training.optimizers import AdamW
from bmgraph.training.placement import Place, Update
from bmgraph.training.step_program import StepProgram
from bmgraph.training.update_phase import UpdatePhase
from bmgraph.verify.metrics import relative_error

TOLERANCE = 1e-5
"""Largest relative error (L2) of a value or a moment after one update; the rule is elementwise."""

RULE = AdamW(lr=0.1, weight_decay=0.1)
SEEN = 3
"""Updates that the moments of the check have seen."""

VALUE, MASTER, GRADIENT = "value", "master", "gradient"
PERIOD = 4099
"""After so many elements the numbers of the check repeat; a prime number, so that rows differ."""


def check_places(step: StepProgram) -> None:
    """Raise VerificationError unless every tensor is as its place says, every returned gradient as its update says, and
    each trained tensor has its own gradient and optimizer state."""
    for name in sorted({*step.tensors} ^ {*step.places}):
        raise VerificationError(f"the step has no place, or no tensor, for {name!r}")
    for name, place in step.places.items():
        _check_held(f"the tensor {name!r}", step.tensors[name], place)
    for name, master in step.masters.items():
        _check_held(f"the master of {name!r}", master, step.updates[name].state)
    for name, node in step.gradients().items():
        update, value = step.updates[name], step.places[name]
        _check_held(f"the gradient of {name!r}", node.meta["val"], update.gradient)
        for what, place in (("gradient", update.gradient), ("optimizer state", update.state)):
            _check_same(what, place, value)
        if not update.state.split and (value.split or update.gradient.split):
            raise VerificationError(
                f"the optimizer state of {name!r} is whole on each rank, which needs its whole value and gradient"
            )


def _check_held(what: str, held: Any, place: Place) -> None:
    if tuple(held.shape) != place.shape or held.dtype != place.dtype:
        raise VerificationError(f"{what} is {held.dtype}{list(held.shape)}, its place is for {place}")


def _check_same(what: str, place: Place, value: Place) -> None:
    """Raise VerificationError unless a place holds the elements of a value in their order."""
    for mine, theirs in zip(value.pieces, place.pieces):
        if mine != theirs:
            raise VerificationError(
                f"{mine.name!r} would be updated with the {what} of {theirs.name!r}, or with another part of its own"
            )
    layouts = [(len(item.pieces), item.packed, item.ranks, item.align) for item in (value, place)]
    if layouts[0] != layouts[1]:
        raise VerificationError(
            f"the {what} of {value.names[0]!r} lies otherwise than its value: pack both alike, for as many ranks"
        )


@dataclass(frozen=True)
class UpdateReference:
    """The places of a step before a pass: what an update of each parameter computes follows from them."""

    places: Mapping[str, Place]
    updates: Mapping[str, Update]

    @staticmethod
    def take(step: StepProgram) -> UpdateReference:
        """Of a step that no pass has shared yet."""
        return UpdateReference(dict(step.places), dict(step.updates))

    def check(self, step: StepProgram) -> None:
        """Raise VerificationError on all ranks unless an update gives the values and moments that it gave before. Collective.

        One tensor of each kind is updated, from numbers that depend on the names of its parameters: what an update does
        follows from the places, and `check_places` has found that the names in them agree.
        """
        kinds: set[tuple[Place, ...]] = set()
        for name, update in step.updates.items():
            places = step.places[name], update.gradient, update.state
            kind = tuple(map(_unnamed, places))
            if kind in kinds or places == self._before(name):
                continue
            kinds.add(kind)
            found = _updated(step, name)
            with step.ranks.fail_together():
                self._compare(found)

    def _before(self, name: str) -> tuple[Place, ...]:
        if name not in self.updates:
            return ()
        return self.places[name], self.updates[name].gradient, self.updates[name].state

    def _compare(self, found: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        dtypes = {
            part: (self.places[name].dtype, update.gradient.dtype, update.state.dtype)
            for name, update in self.updates.items()
            for part in update.state.names
        }
        for part, value in found[VALUE].items():
            storage, reduced, dtype = dtypes[part]
            master = _numbers(part, VALUE, value.shape).to(storage).to(dtype)
            gradient = _numbers(part, GRADIENT, value.shape).to(reduced).to(dtype)
            moments = {key: _numbers(part, key, value.shape).to(dtype) for key in RULE.moments}
            RULE.update([master], [gradient], [moments], RULE.lr, SEEN + 1)
            rounded = (
                found[MASTER][part].cpu().to(storage)
            )  # rounding what differs in its last bit may differ by more
            for key, wanted in {VALUE: rounded, MASTER: master, **moments}.items():
                error = relative_error(found[key][part].cpu(), wanted)
                if not error <= TOLERANCE:
                    what = "update" if key in (VALUE, MASTER) else f"optimizer's {key}"
                    raise VerificationError(
                        f"the {what} of {part!r} is not what it was (an error of {error:.2g})"
                    )


def _updated(step: StepProgram, name: str) -> dict[str, dict[str, torch.Tensor]]:
    """The whole value, master and moments of a tensor after an update, by key and parameter; collective."""
    update, place, rank = step.updates[name], step.places[name], step.ranks.rank

    def held(where: Place, key: str) -> torch.Tensor:
        shapes = {piece.name: piece.shape for piece in where.pieces}
        return where.take(rank, lambda part: _numbers(part, key, shapes[part]))

    with step.ranks.fail_together():
        alone = replace(step, tensors={name: held(place, VALUE)}, updates={name: update}, masters={})
        phase = UpdatePhase(alone)
        phase.moments[name] = {key: held(update.state, key) for key in RULE.moments}
        phase.count = SEEN
        means = phase.means({name: held(update.gradient, GRADIENT)}, 1.0)
    phase.run(RULE, means, RULE.lr)
    where, master = phase.saved(name)
    found = {VALUE: place.join(alone.tensors[name], step.ranks), MASTER: where.join(master, step.ranks)}
    moments = phase.moments[name]
    return found | {key: update.state.join(moments[key], step.ranks) for key in RULE.moments}


def _unnamed(place: Place) -> Place:
    return replace(place, pieces=tuple(replace(piece, name="") for piece in place.pieces))


def _numbers(part: str, key: str, shape: Sequence[int]) -> torch.Tensor:
    """f32 `shape`: numbers that depend on a parameter's name and a key; those of squares are positive."""
    start = int.from_bytes(hashlib.sha256(f"{key} {part}".encode()).digest()[:4], "big") % PERIOD
    some = torch.randn(PERIOD, generator=torch.Generator().manual_seed(0)).roll(start)
    size = prod(shape)
    numbers = some.repeat(-(-size // PERIOD))[:size].reshape(tuple(shape))
    return numbers.square() + 0.1 if key in RULE.squares else numbers
