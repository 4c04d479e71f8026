"""Which axis is the batch, and whether rows are independent, is found over the graph's indices: not by place or equal sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import InputError
from bmgraph.runtime.training.batch_sharding import check_shareable
from bmgraph.training.joint_graph import trace_step
from bmgraph.training.loss_terms import split_loss
from bmgraph.training.row_axes import RowAxes, find_rows

Batch = dict[str, torch.Tensor]
functional = nn.functional


class Model(nn.Module):
    """A layer, and a function of it and the inputs that gives the loss."""

    def __init__(self, loss: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.loss = nn.Linear(6, 6), loss

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Batch:
        """x f[.., 6], y -> loss f[]."""
        return {"loss": self.loss(self.layer, x, y)}


def attended(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x f[B, S, 6] -> f[B, S, 6]."""
    wide = layer(x)
    attended: torch.Tensor = functional.scaled_dot_product_attention(wide, wide, wide)
    return attended


def rows_first(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.mse_loss(attended(layer, x), y)


def time_first(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(attended(layer, x.transpose(0, 1)).mean(1), y)


def shared_mask(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The first input has the length twice."""
    weights = torch.softmax(layer(y) @ y.transpose(1, 2) + x, -1)
    return (weights @ y).square().mean()


def in_batch_negatives(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(layer(x) @ y.T, torch.arange(x.shape[0]))


def ranked(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.mse_loss(layer(x) - layer(x).mean(0), y)


def gated(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What meets is multiplied by zero: the numbers do not tell."""
    return functional.mse_loss(layer(x) + 0.0 * layer(x).flip(0).sum(0), y)


def found(loss: Callable[..., torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> RowAxes:
    return find_rows(split_loss(bg.capture(Model(loss), {"x": x, "y": y}), "loss"))


@pytest.mark.parametrize(
    ("loss", "x", "y", "axes"),
    [
        (rows_first, torch.randn(4, 5, 6), torch.randn(4, 5, 6), {"x": 0, "y": 0}),
        (rows_first, torch.randn(5, 5, 6), torch.randn(5, 5, 6), {"x": 0, "y": 0}),
        (time_first, torch.randn(5, 4, 6), torch.zeros(4, dtype=torch.int64), {"x": 1, "y": 0}),
        (shared_mask, torch.randn(5, 5), torch.randn(4, 5, 6), {"y": 0}),
    ],
)
def test_the_axis_of_rows(
    loss: Callable[..., torch.Tensor], x: torch.Tensor, y: torch.Tensor, axes: dict[str, int]
) -> None:
    assert found(loss, x, y) == RowAxes(axes)


def last_row_left_out(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return layer(x)[:-1].square().mean()


def first_row_twice(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = layer(x)
    return functional.mse_loss(torch.cat([2.0 * out[:1], out[1:]]), y)


def by_number(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.mse_loss(layer(x) * torch.arange(x.shape[0]).unsqueeze(1), y)


def sorted_rows(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.mse_loss(layer(x), y.sort(0).values)


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (in_batch_negatives, "along 'batch' rows meet in aten.matmul.default at "),
        (ranked, "along 'batch' rows meet in aten.mean.dim at "),
        (gated, "along 'batch' rows meet in aten.add.Tensor at "),
        (last_row_left_out, "the loss is not a sum over all rows"),
        (first_row_twice, "depends on the number of a row"),
        (by_number, "depends on the number of a row at "),
        (sorted_rows, "along 'batch' rows meet in aten.sort.default at "),
    ],
)
def test_rows_that_meet_are_not_shared(loss: Callable[..., torch.Tensor], why: str) -> None:
    rows = found(loss, torch.randn(4, 6), torch.randn(4, 6))
    assert not rows.axes
    assert why in rows.reason


def last_token(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What a sequence classifier does: the number of a row picks what is its own."""
    wide = layer(x)
    last = (y != 0).sum(-1) - 1
    return wide[torch.arange(x.shape[0]), last].square().mean()


def diagonal(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Every row meets all others, and only what it makes with itself counts."""
    return torch.diagonal(layer(x) @ y.T).square().mean()


def class_weights(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(layer(x), y, weight=torch.arange(6.0) + 1, ignore_index=2)


@pytest.mark.parametrize(
    ("loss", "x", "y"),
    [
        (last_token, torch.randn(4, 5, 6), torch.ones(4, 5)),
        (diagonal, torch.randn(4, 6), torch.randn(4, 6)),
        (class_weights, torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)),
    ],
)
def test_rows_are_told_from_each_other(
    loss: Callable[..., torch.Tensor], x: torch.Tensor, y: torch.Tensor
) -> None:
    assert found(loss, x, y) == RowAxes({"x": 0, "y": 0})


def placed(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Rows meet, and every position has a vector of its own."""
    return functional.mse_loss(layer(x - x.mean(0)) + layer.weight[: x.shape[1]], y)


def test_positions_are_no_rows() -> None:
    rows = found(placed, torch.randn(4, 5, 6), torch.randn(4, 5, 6))
    assert not rows.axes
    assert "along 'batch' rows meet in aten.mean.dim" in rows.reason
    assert "along 'sequence' the loss depends on the number of a row at" in rows.reason


class Normed(nn.Module):
    """Batch norm: the one place where rows may meet."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Batch:
        """x f[B, 6, S], y f[B, 4] -> loss f[]."""
        return {"loss": functional.mse_loss(torch.relu(self.norm(self.layer(x))).mean(-1), y)}


@pytest.mark.parametrize(("mode", "statistics"), [(True, ("norm",)), (False, ())])
def test_statistics_of_a_batch_norm_are_reported(mode: bool, statistics: tuple[str, ...]) -> None:
    model = Normed()
    model.norm.train(mode)
    program = bg.capture(model, {"x": torch.randn(4, 6, 5), "y": torch.randn(4, 4)})
    assert find_rows(split_loss(program, "loss")) == RowAxes({"x": 0, "y": 0}, "", statistics)


def composite(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Operators that are made up of others."""
    return 1 - functional.cosine_similarity(torch.einsum("bi,bi->bi", layer(x), x), y).mean()


def composite_that_mixes(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.mse_loss(torch.einsum("bi,ci->bi", layer(x), x), y)


def by_size(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The number of rows comes in by the size of what depends on none."""
    shared = torch.ones(1, 6).expand(x.shape[0], 6)
    return functional.mse_loss(layer(x) * (1.0 / shared.shape[0]), y)


def heads_in_rows(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Two heads of each row side by side, [B * 2, 3], which take one table and one index each: repeated, and expanded."""
    rows = x.shape[0]
    table, index = torch.arange(6.0).reshape(2, 3), torch.tensor([[2, 0, 1]]).expand(rows * 2, 3)
    heads = layer(x).reshape(rows * 2, 3).gather(1, index) * table.repeat(rows, 1)
    return functional.mse_loss(heads.reshape(rows, 6), y)


def squared_size(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A mean over as many elements as there are pairs of rows: parts of ranks do not add up."""
    return (layer(x) * y).sum() / torch.ones(x.shape[0] * x.shape[0]).sum()


@pytest.mark.parametrize(
    ("loss", "shared"),
    [
        (composite, True),
        (composite_that_mixes, False),
        (by_size, False),
        (heads_in_rows, True),
        (squared_size, False),
    ],
)
def test_other_operators(loss: Callable[..., torch.Tensor], shared: bool) -> None:
    assert bool(found(loss, torch.randn(4, 6), torch.randn(4, 6)).axes) == shared


def test_ranks_are_told_at_once_that_they_cannot_share() -> None:
    step = trace_step(bg.capture(Model(ranked), {"x": torch.randn(4, 6), "y": torch.randn(4, 6)}), "loss")
    step.ranks, step.rows = Ranks(0, 2), RowAxes({}, "along 'batch' rows meet")
    with pytest.raises(
        InputError,
        match=r"along 'batch' rows meet; .*Torch\(gather=.*; or train on one rank, or .* Torch\(batch=\"rank\"\)",
    ):
        check_shareable(step)
