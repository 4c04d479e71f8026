"""Reads deltas by their form: `LinearFamily.build`, run on names instead of nodes, says how they look in a graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from torch import fx

from bmgraph.ir.node_role import changes_input, is_delta


@dataclass(frozen=True)
class Hole:
    """A place in a form that any node or number fits, the same wherever the name stands."""

    name: str


@dataclass(frozen=True, eq=False)
class FormCall:
    """A call in a form: arguments are forms, holes and constants. on_input: it ends a delta on the input of a linear."""

    target: Any
    args: tuple[Any, ...]
    on_input: bool = False


LINEAR, INPUT, WEIGHT, BIAS, SOURCE = (
    Hole(f"linear's {name}") for name in ["output", "input", "weight", "bias", "source"]
)
"""What a delta reads of its linear; see `DeltaCalls`."""


class FormCalls:
    """Records what a family builds, with the interface of `DeltaCalls`, as a form."""

    linear, input, weight, source = LINEAR, INPUT, WEIGHT, SOURCE
    in_features, out_features = Hole("linear's in_features"), Hole("linear's out_features")

    def __init__(self, with_bias: bool) -> None:
        self.bias = BIAS if with_bias else None

    def __call__(self, target: Any, *args: Any) -> FormCall:
        """A call within the delta."""
        return FormCall(target, args)

    def end(self, target: Any, *args: Any) -> FormCall:
        """The call that ends the delta."""
        return FormCall(target, args)

    def end_input(self, target: Any, *args: Any) -> FormCall:
        """The call that ends the delta on the input."""
        return FormCall(target, args, True)


def subsets(keys: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The keys with and without each optional one."""
    for count in range(len(optional), -1, -1):
        for left in combinations(optional, count):
            yield tuple(key for key in keys if key not in optional or key in left)


def settings(choices: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every setting of options, each to one of its values."""
    for values in product(*choices.values()):
        yield dict(zip(choices, values))


def bound(form: FormCall, total: fx.Node) -> dict[str, Any] | None:
    """What stands in the holes of a form, by name, where a node has it; None where it has another form."""
    if form.on_input is not changes_input(total):
        return None
    found: dict[Hole | FormCall, Any] = {}
    waiting: list[tuple[Any, Any]] = [(form, total)]
    while waiting:
        wanted, value = waiting.pop()
        if isinstance(wanted, (Hole, FormCall)):
            if wanted in found:
                if found[wanted] is not value and found[wanted] != value:
                    return None
                continue
            found[wanted] = value
        if isinstance(wanted, FormCall):
            if not (isinstance(value, fx.Node) and value.target == wanted.target and is_delta(value)):
                return None
            wanted, value = list(wanted.args), list(value.args)
        if isinstance(wanted, (list, tuple)):
            if not isinstance(value, (list, tuple)) or len(wanted) != len(value):
                return None
            waiting += zip(wanted, value)
        elif not isinstance(wanted, Hole) and (isinstance(value, fx.Node) or wanted != value):
            return None
    return {hole.name: value for hole, value in found.items() if isinstance(hole, Hole)}
