"""The table of operators: its rows fit the operators that they are of, and no other module keeps one by name."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from bmgraph.ops.trait_row import UNKNOWN, Dims, Kind
from bmgraph.ops.traits import ROWS, argument, is_elementwise, operators_of, row_of, set_argument, traits_of
from tests.helpers.paths import library_modules

aten = torch.ops.aten

PACKETS = [item for item in ROWS if isinstance(item, torch._ops.OpOverloadPacket)]

NOT_OPERATORS = {
    ("bmgraph.runtime.generation.bounded_jinja", "capitalize"),
    ("bmgraph.serialize.program_json", "add"),
    ("bmgraph.serialize.program_json", "ceil"),
    ("bmgraph.passes.deltas.bottleneck_pass", "relu"),
    ("bmgraph.deltas.weighted_sum", "cat"),
}
"""(module, first name) of tables that name functions on sizes, and of the values that an option may have."""


def _call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    return fx.Graph().call_function(target, args, kwargs)


@pytest.mark.parametrize("packet", PACKETS, ids=str)
def test_a_row_names_arguments_of_its_operator(packet: Any) -> None:
    row = ROWS[packet]
    named = {*row.writes, *([row.train] if row.train else []), *([row.drop] if row.drop else [])}
    named |= {row.step} if row.step else set()
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    assert any(named <= {item.name for item in schema.arguments} for schema in schemas)
    if row.kind is Kind.LOSS:
        assert all("reduction" in {item.name for item in schema.arguments} for schema in schemas)


@pytest.mark.parametrize("packet", [item for item in PACKETS if ROWS[item].keeps_values], ids=str)
def test_what_keeps_values_holds_each_and_no_other(packet: Any) -> None:
    x = torch.arange(1.0, 7.0).reshape(1, 2, 3)
    arguments: dict[str, tuple[Any, ...]] = {
        "reshape": ((3, 2),), "view": ((3, 2),), "unsqueeze": (0,), "unflatten": (2, (3, 1)), "repeat": ((2, 1, 1),),
        "transpose": (1, 2), "permute": ((2, 0, 1),), "roll": ([1], [2]), "flip": ((2,),), "expand": ((4, 2, 3),),
    }  # fmt: skip
    name = packet.__name__
    source = x[0] if name == "t" else x
    found = packet(source, *arguments.get(name, ()))
    assert set(found.flatten().tolist()) == set(source.flatten().tolist())


@pytest.mark.parametrize(
    "packet",
    [item for item in PACKETS if ROWS[item].linear and ROWS[item].dims is Dims.ELEMENTWISE],
    ids=str,
)
def test_what_is_linear_is(packet: Any) -> None:
    more: dict[str, tuple[Any, ...]] = {"to": (torch.float64,)}
    a, b = torch.randn(2, 4, dtype=torch.float64)
    given = more.get(packet.__name__, ())
    torch.testing.assert_close(packet(2 * a + b, *given), 2 * packet(a, *given) + packet(b, *given))


def test_an_operator_without_a_row_claims_nothing() -> None:
    node = _call(aten.cholesky_inverse.default)
    assert traits_of(node) is UNKNOWN
    assert not is_elementwise(node)
    assert row_of("an input") is UNKNOWN
    assert is_elementwise(_call(aten.erf.default))  # by its tag
    assert UNKNOWN.kind is Kind.UNKNOWN
    assert UNKNOWN.not_negative is None


def test_a_row_is_of_all_overloads() -> None:
    assert row_of(aten.lstm.data) is row_of(aten.lstm.input)
    by_place, by_name, left_out = (
        _call(aten.scaled_dot_product_attention.default, 1, 2, 3, None, 0.1),
        _call(aten.scaled_dot_product_attention.default, 1, 2, 3, dropout_p=0.1),
        _call(aten.scaled_dot_product_attention.default, 1, 2, 3),
    )
    for node, found in ((by_place, 0.1), (by_name, 0.1), (left_out, 0.0)):
        assert argument(node, "dropout_p", 0.0) == found
        set_argument(node, "dropout_p", 0.5)
    assert by_place.args[4] == by_name.kwargs["dropout_p"] == 0.5
    assert not left_out.kwargs
    assert torch.ops.bmgraph.dropout_along.default in operators_of(Kind.DROPOUT)


def _tables(path: Path) -> list[str]:
    """The first name of each collection in a file of which most elements are names of operators."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        items = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
        names = [
            item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)
        ]
        known = [name for name in names if name.isidentifier() and hasattr(aten, name)]
        if len(known) > 2 and len(known) > len(names) / 2:
            found.append(known[0])
    return found


def test_no_room_keeps_a_table_of_operators_by_name() -> None:
    kept = {
        (module, name)
        for module, path in library_modules().items()
        if not module.startswith(("bmgraph.ops.", "bmgraph.frontend.canonicalize."))
        for name in _tables(path)
    }
    assert kept == NOT_OPERATORS
