"""The table of operators: what is known of the operator of a call, wherever the code asks for it.

Rows of torch's operators stand in `aten_traits.py`, those of ours beside each operator, those of other packages in the
module that registers them (`outside.py`). An operator without a row has `UNKNOWN`: nothing is assumed of it.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers our operators)
from bmgraph.ops import aten_traits, block_codes, dropout, experts, fake_quantization, quantization
from bmgraph.ops.outside import find_outside, installed_state, is_outside
from bmgraph.ops.trait_row import UNKNOWN, Dims, Kind, Traits

ROWS: dict[Any, Traits] = {
    **aten_traits.ROWS, **block_codes.TRAITS, **dropout.TRAITS, **experts.TRAITS,
    **fake_quantization.TRAITS, **quantization.TRAITS,
}  # fmt: skip
"""Operator with all its overloads, or Python function on sizes -> its row."""


def traits_of(node: fx.Node) -> Traits:
    """The row of the operator that a node calls; UNKNOWN for other nodes."""
    return row_of(node.target) if node.op == "call_function" else UNKNOWN


def row_of(target: Any) -> Traits:
    """The row of an operator, given by one of its overloads; UNKNOWN if it has none."""
    row = _own_row(target)
    return _outside_row(target, installed_state()) if row is None else row


@lru_cache(maxsize=1024)
def _outside_row(target: Any, state: object) -> Traits:
    """The row of another package's operator, while the same packages are installed."""
    found = find_outside(target)
    return UNKNOWN if found is None else found[1].traits


@cache
def _own_row(target: Any) -> Traits | None:
    """The row of an operator of torch or bmgraph; None for one of another package."""
    if is_outside(target):
        return None
    if isinstance(target, torch._ops.OpOverload):
        return ROWS.get(target.overloadpacket, UNKNOWN)
    return ROWS.get(target, UNKNOWN)


def calls(node: fx.Node, *operators: Any) -> bool:
    """Whether a node calls one of some operators, each given with all its overloads."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket in operators


def is_elementwise(node: fx.Node) -> bool:
    """Whether a call computes each element from those in its place, by the operator's tag or its row."""
    return is_tagged_pointwise(node) or traits_of(node).dims is Dims.ELEMENTWISE


def is_tagged_pointwise(node: fx.Node) -> bool:
    """Whether torch tags the operator of a call as pointwise."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """The value of an argument of a call, given by position or by name; `default` where it is left out."""
    place = place_of(node.target, name)
    given = place is not None and len(node.args) > place
    return node.args[place] if given else node.kwargs.get(name, default)  # type: ignore[index]


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Change an argument of a call; one that is left out stays so."""
    place = place_of(node.target, name)
    if place is not None and len(node.args) > place:
        node.update_arg(place, value)
    elif name in node.kwargs:
        node.update_kwarg(name, value)


def is_random(node: fx.Node) -> bool:
    """Whether a call draws random numbers; one whose probability of dropout is 0 does not."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    row = traits_of(node)
    if row.train:
        return argument(node, row.train, False) is not False
    drop = row.drop or _KERNELS_DROP
    return place_of(node.target, drop) is None or argument(node, drop, 0.0) not in (0, 0.0)


_KERNELS_DROP = "dropout_p"
"""How the kernels of attention, which only training steps call, name their probability of dropout."""


def operators_of(kind: Kind) -> list[torch._ops.OpOverload]:
    """The operators of a kind, torch's and ours."""
    return [packet.default for packet, row in ROWS.items() if row.kind is kind]


def unsaid_dims(node: fx.Node) -> str:
    """What to add to a message that takes a call to need all elements, because no row says otherwise; else empty."""
    known = is_tagged_pointwise(node) or traits_of(node).dims is not Dims.UNKNOWN
    if known or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return (
        ", as far as is known: no row says how the dimensions of its operands belong together (Traits.dims)"
    )


@cache
def place_of(target: Any, argument: str) -> int | None:
    """The position of an argument in calls of an operator; None if it has no such argument."""
    schema = getattr(target, "_schema", None)
    names = [item.name for item in schema.arguments] if schema is not None else []
    return names.index(argument) if argument in names else None
