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

    def forward(self, x: torch.Tensor, y: torch.Tensor, reduction: str = "mean") -> dict[str, torch.Tensor]:
        """x f[B, 6], y i64[B] -> loss f[]."""
        hidden = self.norm(self.drop(self.first(x) + self.second(x)))
        scores = self.last(torch.relu(hidden))
        return {"loss": nn.functional.cross_entropy(scores, y, reduction=reduction)}


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


@pytest.mark.parametrize(
    "passes",
    [(ZeRO(3),), *(pytest.param(given, marks=pytest.mark.slow) for given in ((), (ZeRO(1),)))],
    ids=str,
)
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


def test_one_rank_and_part_in_fp32_is_plain_torch_to_the_bit() -> None:
    trainer, model = trainer_of(captured(), accumulate=1, clip_norm=0.5), made().train()
    rule = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    trainer.optimizer = AdamW(lr=1e-2, weight_decay=0.0)
    for batch in batches(7):
        total, count = model(**batch, reduction="sum")["loss"], int((batch["y"] >= 0).sum())
        rule.zero_grad()
        total.backward()
        means = [parameter.grad / count for parameter in model.parameters() if parameter.grad is not None]
        norm = float(torch.stack([mean.double().square().sum() for mean in means]).sum().sqrt())
        for parameter, mean in zip(model.parameters(), means):
            parameter.grad = mean.mul_(0.5 / norm) if norm > 0.5 else mean
        rule.step()
        found = trainer.step(batch)
        assert (found.loss, found.norm, found.count) == (total.item() / count, norm, count)
    for name, value in trainer.program().parameters.items():
        assert torch.equal(value, model.get_parameter(name)), name


@pytest.mark.slow
def test_fewer_rows_than_parts_and_one_part() -> None:
    trainer, whole = trainer_of(captured()), trainer_of(captured(), accumulate=1)
    for batch in (batches(2)[1], batches(4)[0]):
        assert trainer.step(batch).loss == pytest.approx(whole.step(batch).loss, rel=1e-5)


@pytest.mark.slow
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
    def forward(self, x: torch.Tensor, y: torch.Tensor, reduction: str = "mean") -> dict[str, torch.Tensor]:
        """A loss that is no mean."""
        return {"loss": super().forward(x, y, reduction)["loss"].square()}


def on_ranks(rank: int, stages: tuple[int, ...]) -> dict[str, Any]:
    given = batches(8)
    found: dict[str, Any] = {}
    for stage in stages:
        trainer = trainer_of(captured(), ZeRO(stage), accumulate=4, clip_norm=0.5)
        runners = trainer.gradients._runners
        nodes = [[node.meta["collective"] for node in runner._collectives._nodes] for runner in runners]
        found[f"calls {stage}"] = [{call._schema.name.split("::")[1] for call in calls} for calls in nodes]
        done = [trainer.step(batch) for batch in given]
        found[f"losses {stage}"] = [(item.loss, item.norm) for item in done]
    own = trainer_of(captured(), ZeRO(stages[-1]), accumulate=4, batch="rank", clip_norm=0.5)
    rows = [{key: value[:3] if rank else value[3:] for key, value in batch.items()} for batch in given]
    found["own rows"] = [own.step(batch).loss for batch in rows]
    if rank:
        rows[0]["y"] = torch.full_like(
            rows[0]["y"], 77
        )  # fails in its first micro-batch, in the middle of the graph
    try:
        own.step(rows[0])
    except (BmgraphError, IndexError) as error:
        found["error"] = str(error)
    dist.barrier()
    return found


@pytest.mark.parametrize("stages", [(1, 3), pytest.param((0, 2), marks=pytest.mark.slow)])
def test_ranks_reduce_once_where_gradients_are_whole(stages: tuple[int, ...]) -> None:
    first, second = run_ranks(2, on_ranks, stages)
    assert all(first[key] == second[key] for key in first if key != "error")
    single = trainer_of(captured(), accumulate=1, clip_norm=0.5)
    done = [single.step(batch) for batch in batches(8)]
    plain = [(item.loss, item.norm) for item in done]
    for stage in stages:
        assert first[f"losses {stage}"] == [pytest.approx(pair, rel=1e-5) for pair in plain], stage
        begin, middle, last = first[f"calls {stage}"]
        if stage in (0, 1):
            assert begin == middle == set()
            assert last == {"all_reduce"}
        else:
            assert begin == middle
            assert "reduce_scatter_tensor" in begin
    assert first["own rows"] == pytest.approx([loss for loss, _ in plain], rel=1e-5)
    assert "77" in first["error"]
    assert "77" in second["error"]
