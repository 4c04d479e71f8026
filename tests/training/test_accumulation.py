"""Micro-batches: a step whose batch is split is the step on the whole batch, and reduces no more than it must."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, AdamW, Torch
from bmgraph.errors import BmgraphError, InputError
from bmgraph.ir.program import Program
from bmgraph.passes import ZeRO
from bmgraph.runtime.training.trainer import Trainer
from tests.helpers.ranks import run_ranks
from tests.helpers.training import naive_losses

Batch = dict[str, torch.Tensor]


class Classes(nn.Module):
    """Two layers that share a bias's gradient, a residual and ragged labels."""

    def __init__(self, drop: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(6, 8), nn.Linear(6, 8), nn.Dropout(drop)
        self.norm, self.last = nn.BatchNorm1d(8) if norm else nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """x f[B, 6], y i64[B] -> loss f[]."""
        hidden = self.norm(self.drop(self.first(x) + self.second(x)))
        return {"loss": nn.functional.cross_entropy(self.last(torch.relu(hidden)), y)}


def made(drop: float = 0.0, norm: bool = False) -> Classes:
    torch.manual_seed(0)
    return Classes(drop, norm)


def batches(rows: int, count: int = 4) -> list[Batch]:
    """The first rows have fewer valid labels than the last, so that a mean of means would be another loss."""
    torch.manual_seed(1)
    labels = torch.randint(0, 5, (count, rows))
    labels[:, : rows // 2] = torch.where(torch.rand(count, rows // 2) < 0.6, -100, labels[:, : rows // 2])
    return [{"x": 3 * torch.randn(rows, 6), "y": row} for row in labels]


@cache
def captured(drop: float = 0.0, norm: bool = False) -> Program:
    return bg.capture(made(drop, norm), batches(6)[0])


def trainer_of(program: Program, *passes: Any, accumulate: int = 3, **options: Any) -> Trainer:
    backend = Torch(optimizer=options.pop("optimizer", AdamW(lr=1e-2)), accumulate=accumulate, **options)
    trainer: Trainer = bg.compile(program, passes=passes, backend=backend)
    return trainer


@pytest.mark.parametrize("passes", [(), (ZeRO(1),), (ZeRO(3),)], ids=str)
def test_ragged_parts_make_the_whole_step(passes: tuple[Any, ...]) -> None:
    given, model = batches(7), made()
    trainer = trainer_of(captured(), *passes, clip_norm=0.5)
    assert [len(part["y"]) for part in trainer.gradients.micro_batches(given[0], given[0])] == [2, 2, 3]
    whole = trainer_of(captured(), *passes, clip_norm=0.5, accumulate=1)
    for batch in given:
        mine, theirs = trainer.step(batch), whole.step(batch)
        assert (mine.loss, mine.norm) == pytest.approx((theirs.loss, theirs.norm), rel=1e-5)
        assert mine.count == theirs.count
    for name, value in trainer.program().parameters.items():
        assert torch.allclose(value, whole.program().parameters[name], rtol=1e-4, atol=1e-5), name
    plain = naive_losses(model, torch.optim.AdamW(model.parameters(), lr=1e-2), batches(7))
    unclipped = trainer_of(captured(), *passes)
    assert [unclipped.step(batch).loss for batch in given] == pytest.approx(plain, rel=1e-5)


def test_fewer_rows_than_parts_and_one_part() -> None:
    trainer, whole = trainer_of(captured()), trainer_of(captured(), accumulate=1)
    for batch in (batches(2)[1], batches(4)[0]):
        assert trainer.step(batch).loss == pytest.approx(whole.step(batch).loss, rel=1e-5)


def test_dropout_and_statistics_run_on_from_part_to_part() -> None:
    given, model = batches(7), made(drop=0.4, norm=True)
    for batch in given:
        batch["y"][0] = 1  # a label in every part: eager would divide by zero
    with pytest.raises(InputError, match="accumulate=3: a batch of this model cannot be split"):
        trainer_of(
            captured(drop=0.4, norm=True),
            loss=lambda outputs, inputs: (outputs["loss"].exp(), inputs["y"].sum()),
        )
    rate = SGD(
        lr=0.1
    )  # AdamW makes whole steps of the gradients in front of the norm, which are rounding alone
    trainer = trainer_of(captured(drop=0.4, norm=True), optimizer=rate)
    assert any("each micro-batch's own rows in 'norm'" in note for note in trainer.report.notes)
    other = trainer_of(captured(drop=0.4, norm=True), optimizer=rate)
    rule = torch.optim.SGD(model.train().parameters(), lr=0.1)
    for step, batch in enumerate(given):
        rule.zero_grad()
        count, total = int((batch["y"] >= 0).sum()), 0.0
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"0 {step} 0".encode()).digest()[:7], "big"))
        for part in trainer.gradients.micro_batches(batch, batch):
            kept = int((part["y"] >= 0).sum())
            loss = model(**part)["loss"] * kept / count
            loss.backward()
            total += loss.item()
        rule.step()
        assert trainer.step(batch).loss == pytest.approx(total, rel=1e-5)
        other.step(batch)
    assert torch.allclose(trainer.program().buffers["norm.running_mean"], model.norm.running_mean)
    assert torch.equal(trainer.program().parameters["last.weight"], other.program().parameters["last.weight"])


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(InputError, match="not one mean over items that ranks or micro-batches can share"):
        bg.compile(Squared(), example=batches(6)[0], backend=Torch(optimizer=SGD(lr=0.1), accumulate=2))
    with pytest.raises(InputError, match="accumulate=0: give the number of micro-batches"):
        Torch(optimizer=SGD(lr=0.1), accumulate=0)


class Squared(Classes):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """A loss that is no mean."""
        return {"loss": super().forward(x, y)["loss"].square()}


def on_ranks(rank: int) -> dict[str, Any]:
    given = batches(8)
    found: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        trainer = trainer_of(captured(), ZeRO(stage), accumulate=4, clip_norm=0.5)
        calls: list[str] = []
        for runner in trainer.gradients._runners:
            nodes = runner._collectives._nodes
            calls.append(
                " ".join(sorted(str(node.meta["collective"]._schema.name).split("::")[1] for node in nodes))
            )
        found[f"calls {stage}"] = calls
        found[f"losses {stage}"] = [(trainer.step(batch).loss, trainer.step(batch).norm) for batch in given]
    own = trainer_of(captured(), ZeRO(1), accumulate=4, batch="rank")
    rows = [{key: value[:3] if rank else value[3:] for key, value in batch.items()} for batch in given]
    found["own rows"] = [own.step(batch).loss for batch in rows]
    whole = trainer_of(captured(), ZeRO(1), accumulate=1)
    found["whole"] = [whole.step(batch).loss for batch in given]
    bad = dict(rows[0])
    if rank:
        bad["y"] = bad["y"].clone().fill_(77)  # fails in its first micro-batch, in the middle of the graph
    try:
        trainer_of(captured(), ZeRO(3), accumulate=3, batch="rank").step(bad)
    except (BmgraphError, IndexError) as error:
        found["error"] = str(error)
    dist.barrier()
    return found


def test_ranks_reduce_once_where_gradients_are_whole() -> None:
    first, second = run_ranks(2, on_ranks)
    assert all(first[key] == second[key] for key in first if key != "error")
    single = trainer_of(captured(), accumulate=1, clip_norm=0.5)
    plain = [(single.step(batch).loss, single.step(batch).norm) for batch in batches(8)]
    for stage in range(4):
        assert first[f"losses {stage}"] == [pytest.approx(pair, rel=1e-5) for pair in plain], stage
    assert first["own rows"] == pytest.approx(first["whole"], rel=1e-5)
    for stage in (0, 1):
        begin, middle, last = first[f"calls {stage}"]
        assert begin == middle == ""
        assert set(last.split()) == {"all_reduce"}
    assert "reduce_scatter_tensor" in first["calls 2"][0]
    assert "all_gather" in first["calls 3"][0]
    assert "77" in first["error"]
    assert "77" in second["error"]
