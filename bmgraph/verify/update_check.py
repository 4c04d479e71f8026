"""Checks the update phase of a step after a pass: where values, gradients and states are, and what an update makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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

LARGEST = 2**22
"""Elements of a parameter that is updated as it is; of a larger one in a place of its own, as an embedding has, some rows are."""

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
    checked: set[tuple[Place, ...]] = field(default_factory=set, compare=False)
    """The kinds of tensors whose updates were found to be right, by their places without names."""

    @staticmethod
    def take(step: StepProgram) -> UpdateReference:
        """Of a step that no pass has shared yet."""
        return UpdateReference(dict(step.places), dict(step.updates))

    def check(self, step: StepProgram) -> None:
        """Raise VerificationError on all ranks unless an update gives the values and moments that it gave before. Collective.

        One tensor of each kind is updated, from numbers that depend on the names of its parameters: what an update does
        follows from the places, and `check_places` has found that the names in them agree. A kind is checked once.
        """
        for name, update in step.updates.items():
            places = step.places[name], update.gradient, update.state
            kind = tuple(map(_unnamed, places))
            if kind not in self.checked and places != self._before(name):
                self._check_one(step, name)
                self.checked.add(kind)

    def _check_one(self, step: StepProgram, name: str) -> None:
        """Check the update of one tensor; the results are whole one after another."""
        place, gradient, state = map(
            _smaller, (step.places[name], step.updates[name].gradient, step.updates[name].state)
        )
        updated = _updated(step, name, place, Update(gradient, state))
        with step.ranks.fail_together():
            expected = self._expected(state.names, place)
        for key in list(updated):
            where, held = updated.pop(key)
            found = where.join(held, step.ranks)
            with step.ranks.fail_together():
                for part, wanted in expected.pop(key).items():
                    error = relative_error(found[part].cpu(), wanted)
                    if not error <= TOLERANCE:
                        what = "update" if key in (VALUE, MASTER) else f"optimizer's {key}"
                        raise VerificationError(
                            f"the {what} of {part!r} is not what it was (an error of {error:.2g})"
                        )
            if key == MASTER:  # rounding what differs in its last bit may differ by more
                dtypes = self._dtypes()
                expected[VALUE] = {part: value.cpu().to(dtypes[part][0]) for part, value in found.items()}

    def _before(self, name: str) -> tuple[Place, ...]:
        if name not in self.updates:
            return ()
        return self.places[name], self.updates[name].gradient, self.updates[name].state

    def _dtypes(self) -> dict[str, tuple[torch.dtype, torch.dtype, torch.dtype]]:
        """Those of the value, the gradient and the state before, by parameter."""
        return {
            part: (self.places[name].dtype, update.gradient.dtype, update.state.dtype)
            for name, update in self.updates.items()
            for part in update.state.names
        }

    def _expected(self, parts: Sequence[str], place: Place) -> dict[str, dict[str, torch.Tensor]]:
        """What an update made of each part's master and moments before, by key and parameter; values are rounded masters."""
        dtypes = self._dtypes()
        shapes = {piece.name: piece.shape for piece in place.pieces}
        expected: dict[str, dict[str, torch.Tensor]] = {}
        for part in parts:
            storage, reduced, dtype = dtypes[part]
            master = _numbers(part, VALUE, shapes[part]).to(storage).to(dtype)
            gradient = _numbers(part, GRADIENT, shapes[part]).to(reduced).to(dtype)
            moments = {key: _numbers(part, key, shapes[part]).to(dtype) for key in RULE.moments}
            RULE.update([master], [gradient], [moments], RULE.lr, SEEN + 1)
            for key, value in {MASTER: master, **moments}.items():
                expected.setdefault(key, {})[part] = value
        return expected


def _updated(
    step: StepProgram, name: str, place: Place, update: Update
) -> dict[str, tuple[Place, torch.Tensor]]:
    """What this rank holds of the master, the value and the moments of a tensor in these places after an update, each with its
    place; collective where values are gathered."""
    rank = step.ranks.rank

    def held(where: Place, key: str) -> torch.Tensor:
        shapes = {piece.name: piece.shape for piece in where.pieces}
        return where.take(rank, lambda part: _numbers(part, key, shapes[part]))

    with step.ranks.fail_together():
        alone = replace(
            step, places={name: place}, tensors={name: held(place, VALUE)}, updates={name: update}, masters={}
        )
        phase = UpdatePhase(alone)
        phase.moments[name] = {key: held(update.state, key) for key in RULE.moments}
        phase.count = SEEN
        means = phase.means({name: held(update.gradient, GRADIENT)}, 1.0)
    phase.run(RULE, means, RULE.lr)
    found = {MASTER: phase.saved(name), VALUE: (place, alone.tensors[name])}
    moments = phase.moments[name]
    return found | {key: (update.state, moments[key]) for key in RULE.moments}


def _smaller(place: Place) -> Place:
    """A place for a parameter of fewer rows, where it holds a single one that is larger than LARGEST: an update works element by
    element, and nothing else of a place depends on their number."""
    if len(place.pieces) > 1 or place.size <= LARGEST or place.pieces[0].offset:
        return place
    piece = place.pieces[0]
    rows = max(LARGEST * piece.shape[0] // place.size, 2 * place.ranks + 1)
    return replace(place, pieces=(replace(piece, shape=(min(rows, piece.shape[0]), *piece.shape[1:])),))


def _unnamed(place: Place) -> Place:
    return replace(place, pieces=tuple(replace(piece, name="") for piece in place.pieces))


def _numbers(part: str, key: str, shape: Sequence[int]) -> torch.Tensor:
    """f32 `shape`: numbers that depend on a parameter's name and a key; those of squares are positive."""
    start = int.from_bytes(hashlib.sha256(f"{key} {part}".encode()).digest()[:4], "big") % PERIOD
    some = torch.randn(PERIOD, generator=torch.Generator().manual_seed(0)).roll(start)
    size = prod(shape)
    numbers = some.repeat(-(-size // PERIOD))[:size].reshape(tuple(shape))
    return numbers.square_().add_(0.1) if key in RULE.squares else numbers
