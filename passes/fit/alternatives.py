"""What `Fit` may take: the alternatives of each text, and their combinations in the order of the texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bmgraph.errors import InputError
from bmgraph.pass_manager.pass_base import ModelPass, Pass
from bmgraph.pass_manager.pass_spec import parse_alternatives

MOST = 20_000
"""Combinations that are listed."""

Key = tuple[int, ...]
"""A combination: the numbers of its alternatives, rising."""


@dataclass(frozen=True)
class Alternative:
    """Passes that are taken together or not at all, of the text of this place in `over`."""

    entry: int
    passes: tuple[ModelPass, ...]

    @property
    def only_trains(self) -> bool:
        """Whether it does nothing but train, which helps behind others alone."""
        return all(item.will_train for item in self.passes)

    @property
    def resources(self) -> tuple[str, ...]:
        """What its passes read."""
        return tuple(name for item in self.passes for name in item.resources)


def alternatives_of(texts: Sequence[str], known: Mapping[str, type[Pass]]) -> list[Alternative]:
    """The alternatives of all texts, in order. Raises InputError for a text that names no pass, or one of another stage."""
    found = []
    for entry, text in enumerate(texts):
        for passes in parse_alternatives(text, known):
            if not passes:
                raise InputError(f"over[{entry}]={text!r} names no pass")
            model = tuple(item for item in passes if isinstance(item, ModelPass))
            other = next((item for item in passes if not isinstance(item, ModelPass)), None)
            if other is not None:
                raise InputError(
                    f"over[{entry}]: {other} is of the {other.acts_on} stage, and what is chosen rewrites the model"
                )
            found.append(Alternative(entry, model))
    return found


def combinations(
    alternatives: Sequence[Alternative], holds: Callable[[Sequence[ModelPass]], bool]
) -> list[Key]:
    """All combinations, of at most one alternative of a text, in which the passes `hold` together; the empty one is not among them.

    A combination whose first passes do not hold is left out with all that continue it. Raises InputError where there are more than MOST.
    """

    def continued(key: Key) -> Iterator[Key]:
        last = alternatives[key[-1]].entry if key else -1
        for number, item in enumerate(alternatives):
            longer = (*key, number)
            if item.entry > last and holds(passes_of(alternatives, longer)):
                yield longer
                yield from continued(longer)

    found: list[Key] = []
    for key in continued(()):
        found.append(key)
        if len(found) > MOST:
            raise InputError(f"over= has more than {MOST} combinations: give fewer texts or values")
    return found


def passes_of(alternatives: Sequence[Alternative], key: Key) -> list[ModelPass]:
    """The passes of a combination, in order."""
    return [item for number in key for item in alternatives[number].passes]
