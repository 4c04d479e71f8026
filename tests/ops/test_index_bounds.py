"""Indices out of range are errors before a kernel runs; those that the CPU takes are let pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bmgraph.ops.index_bounds import IndexBounds

TABLE = torch.arange(12.0).reshape(4, 3)
aten = torch.ops.aten


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values)


FINE: dict[str, Callable[[], Any]] = {
    "rows": lambda: aten.embedding(TABLE, ids(0, 3)),
    "from the end": lambda: TABLE[ids(-4, 3)],
    "behind a mask": lambda: TABLE.reshape(2, 2, 3)[torch.ones(2, 2, dtype=torch.bool), ids(2, 2, 2, 2)],
    "an axis": lambda: TABLE.gather(1, ids(2, 0)[None].expand(4, 2)),
    "an axis from the end": lambda: TABLE.index_select(-1, ids(2)),
    "no index": lambda: TABLE.index_select(0, ids().long()),
    "labels": lambda: torch.nn.functional.cross_entropy(TABLE, ids(0, 2, -100, 1)),
    "labels left out": lambda: torch.nn.functional.cross_entropy(TABLE, ids(0, 2, 7, 1), ignore_index=7),
    "written": lambda: aten.scatter(TABLE, 1, ids(2)[None], 1.0),
    "a number": lambda: torch.tensor(3.0).index_select(0, ids(0)),
}
WRONG: dict[str, Callable[[], Any]] = {
    "rows": lambda: aten.embedding(TABLE, ids(0, 4)),
    "rows from the end": lambda: aten.embedding(TABLE, ids(-1)),
    "a list": lambda: TABLE[:, ids(3)],
    "an axis": lambda: TABLE.gather(1, ids(3)[None]),
    "labels": lambda: torch.nn.functional.cross_entropy(TABLE, ids(0, 3, -100, 1)),
    "written": lambda: aten.scatter(TABLE, 1, ids(3)[None], 1.0),
}


@pytest.mark.parametrize("name", FINE)
def test_what_the_cpu_takes_is_let_pass(name: str) -> None:
    expected = FINE[name]()
    with IndexBounds():
        assert torch.equal(FINE[name](), expected)


@pytest.mark.parametrize("name", WRONG)
def test_others_are_named(name: str) -> None:
    with (
        pytest.raises(IndexError, match=r"only -?[0-9]+ to 2 are there|only 0 to 3 are there"),
        IndexBounds(),
    ):
        WRONG[name]()
