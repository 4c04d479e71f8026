"""Which integers an input may hold: found in the dataflow, checked before anything runs, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bmgraph as bg
from bmgraph.errors import InputError
from tests.helpers.bundles import edit_json

Lookup = Callable[["Tables", torch.Tensor], torch.Tensor]


class Tables(nn.Module):
    """Tables of 9 and of 5 rows, and what is made of ids [B, S] with them."""

    def __init__(self, lookup: Lookup) -> None:
        super().__init__()
        self.long, self.short, self.lookup = nn.Embedding(9, 4), nn.Embedding(5, 4), lookup

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lookup(self, ids)


BOUNDED: dict[str, tuple[Lookup, tuple[int, int | None]]] = {
    "a table": (lambda model, ids: model.long(ids), (0, 8)),
    "two tables": (lambda model, ids: model.long(ids) + model.short(ids), (0, 4)),
    "shifted": (lambda model, ids: model.long(ids.flatten() + 2), (-2, 6)),
    "behind a prefix": (
        lambda model, ids: model.long(torch.cat([torch.zeros_like(ids[:, :1]), ids], 1)), (0, 8),
    ),
    "each column": (lambda model, ids: model.long(ids[:, 0]) + model.short(ids[:, 1]), (0, 8)),
    "one hot": (lambda model, ids: F.one_hot(ids, 7).float(), (0, 6)),
    "rows of a value": (lambda model, ids: model.long.weight[:6].tanh()[ids], (-6, 5)),
    "along a size": (
        lambda model, ids: (model.long(ids.clamp(0, 8)).sum(-1)).gather(1, ids), (0, None),
    ),
}  # fmt: skip

FREE: dict[str, Lookup] = {
    "clamped": lambda model, ids: model.long(ids.clamp(0, 8)),
    "replaced": lambda model, ids: model.long(ids.masked_fill(ids == -100, 0)),
    "cut away": lambda model, ids: model.long(ids[:, :-1]),
    "not looked up": lambda model, ids: ids * model.long.weight.sum(),
}


def _captured(lookup: Lookup, columns: int = 3) -> bg.Program:
    return bg.capture(Tables(lookup), {"ids": torch.arange(2 * columns).reshape(2, columns) % 3})


@pytest.mark.parametrize("case", BOUNDED)
def test_bounds_are_those_of_the_tables(case: str) -> None:
    lookup, bounds = BOUNDED[case]
    if case == "each column":
        program = bg.capture(Tables(lookup), {"ids": torch.ones(3, 2, dtype=torch.int64)}, dynamic=False)
    else:
        program = _captured(lookup)
    assert program.inputs[0].values == bounds


@pytest.mark.parametrize("case", FREE)
def test_what_does_not_reach_a_table_is_free(case: str) -> None:
    assert _captured(FREE[case]).inputs[0].values is None


def test_each_runner_refuses_ids_out_of_range(tmp_path: Path) -> None:
    program = _captured(BOUNDED["a table"][0])
    engine = bg.compile(program, passes=[], backend="onnx")
    engine.save(tmp_path / "engine")
    program.save(str(tmp_path / "program"))
    runners = (
        program, engine, bg.compile(program, passes=[], backend="torch"),
        bg.load(tmp_path / "engine"), bg.load(tmp_path / "program"),
    )  # fmt: skip
    for runner in runners:
        for wrong in (-1, 9):
            with pytest.raises(InputError, match=rf"input 'ids' holds {wrong} at \[1, 0\].* has 0 to 8"):
                runner(ids=torch.tensor([[0, 8], [wrong, 1]]))
        runner(ids=torch.tensor([[0, 8]]))


def test_bundles_of_early_versions_load(tmp_path: Path) -> None:
    program = _captured(BOUNDED["a table"][0])
    engine = bg.compile(program, passes=[], backend="onnx")
    engine.save(tmp_path / "engine")

    def forget(manifest: dict[str, Any]) -> None:
        del manifest["inputs"][0]["values"]

    edit_json(tmp_path / "engine" / "manifest.json", forget)
    loaded = bg.load(tmp_path / "engine")
    assert loaded.inputs[0].values is None
    assert loaded(ids=torch.tensor([[0, 8]]))["output"].shape == (1, 2, 4)


class Rows(nn.Module):
    """Rows of a parameter that an index selects, which may count from the end."""

    def __init__(self, index: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.table, self.index = nn.Parameter(torch.randn(9, 4)), index
        self.register_buffer("pairs", torch.arange(9).reshape(3, 3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[self.index(ids)] + self.table[self.pairs].mean()


def test_an_index_may_count_from_the_end() -> None:
    """Relative positions are negative on purpose; a part of the ids may be, as in eager."""
    distances = Rows(lambda ids: torch.arange(ids.shape[1])[None] - torch.arange(ids.shape[1])[:, None])
    last = Rows(lambda ids: ids[:, -1])
    for model in (distances, last):
        program = bg.capture(model, {"ids": torch.randint(0, 9, (2, 4))})
        engine = bg.compile(program, passes=[], backend="onnx")
        ids = torch.tensor([[0, 1, -9], [0, 1, -2], [0, 1, 8]])
        expected = model(ids)
        torch.testing.assert_close(program(ids=ids)["output"], expected)
        torch.testing.assert_close(torch.as_tensor(engine(ids=ids)["output"]), expected)


@pytest.mark.parametrize(
    "index",
    [
        lambda ids: ids,
        lambda ids: torch.arange(ids.shape[1]) + 2,
        lambda ids: (torch.arange(ids.shape[1])[None] - torch.arange(ids.shape[1])[:, None]).clamp(0, 4),
        lambda ids: (torch.arange(ids.shape[1])[None] - torch.arange(ids.shape[1])[:, None]).abs(),
    ],
)
def test_an_index_that_is_never_negative_is_an_embedding(
    index: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    program = bg.capture(Rows(index), {"ids": torch.randint(0, 9, (2, 4))})
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count(torch.ops.aten.embedding.default) == 2


class Chosen(nn.Module):
    """One of four weights for each row, by a number that a caller gives."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift, self.weights = shift, nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.bmm(self.weights[ids + self.shift], x.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("shift", [0, -4])
def test_numbers_of_experts_are_bounded(shift: int) -> None:
    """Those that a caller gives are refused out of range; those that count from the end are computed as an index."""
    program = bg.capture(Chosen(shift), {"x": torch.randn(3, 8), "ids": torch.tensor([0, 3, 1])})
    low, high = (0, 3) if shift == 0 else (0, 7)
    assert program.inputs[1].values == (low, high)
    with pytest.raises(InputError, match="input 'ids' holds 9"):
        program(x=torch.randn(3, 8), ids=torch.tensor([0, 9, 1]))


def test_a_sum_that_takes_away_may_be_negative() -> None:
    """Places from the end are looked up as in eager: `a - 2 b` is written as a sum with a factor."""

    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """x f[B, 5, 4] -> f[B, 5, 4]."""
            places = torch.arange(5)
            return x + self.table[torch.add(places, torch.ones_like(places), alpha=-2)]

    model, x = Wraps(), torch.randn(2, 5, 4)
    program = bg.capture(model, {"x": x})
    assert "aten.embedding" not in str(program)
    torch.testing.assert_close(program(x=x)["output"], model(x))
