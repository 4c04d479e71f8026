"""A loss of several terms is that of plain PyTorch on the whole batch, over ranks and micro-batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, Torch
from bmgraph.passes import ZeRO
from bmgraph.runtime.training.trainer import Trainer
from tests.helpers.ranks import run_ranks

F = nn.functional
STEPS = 6
RATE = 0.5


class Tagger(nn.Module):
    """Two heads with labels of their own, a penalty of weights and, with `router`, a product of means over all tokens."""

    def __init__(self, router: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = router
        self.table, self.tags, self.words = nn.Embedding(9, 6), nn.Linear(6, 4), nn.Linear(6, 9)

    def forward(
        self, ids: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        h = torch.tanh(self.table(ids))
        tags, words = self.tags(h), self.words(h)
        loss = F.cross_entropy(tags.flatten(0, 1), labels.flatten())
        loss = loss + 0.3 * F.cross_entropy(words.flatten(0, 1), masked.flatten()) - h.mean() * 0.1
        if self.router:
            shares = tags.softmax(-1).mean((0, 1))
            return {"loss": loss + 0.01 * (shares * shares).sum()}
        return {"loss": loss + 0.01 * self.tags.weight.square().mean()}


def batch(seed: int, rows: int = 5) -> dict[str, torch.Tensor]:
    """Ragged labels: the first rows have none that count."""
    generator = torch.Generator().manual_seed(seed)
    ids, masked = (torch.randint(0, 9, (rows, 7), generator=generator) for _ in range(2))
    valid = torch.arange(7)[None] < torch.arange(rows)[:, None] * 2 - 2
    return {
        "ids": ids,
        "labels": torch.where(valid, ids % 4, -100),
        "masked": torch.where(torch.rand(ids.shape, generator=generator) < 0.4, masked, -100),
    }


def plain(model: nn.Module) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for seed in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch(seed))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(rank: int, kind: str, accumulate: int, stage: int | None) -> list[float]:
    model = Tagger()
    passes = () if stage is None else (ZeRO(stage),)
    backend = Torch(optimizer=SGD(lr=RATE), batch=kind, accumulate=accumulate, passes=passes)
    trainer = bg.compile(model, example=batch(0), backend=backend)
    losses = []
    for seed in range(STEPS):
        given = batch(seed)
        if kind == "rank":  # rank 0 has no label that counts
            given = {name: value[:2] if rank == 0 else value[2:] for name, value in given.items()}
        if seed == 1:
            before = trainer.evaluate([given]).loss
        losses.append(trainer.step(given).loss)
    assert losses[1] == pytest.approx(before, rel=1e-6)
    check_evaluation(trainer, rank, kind)
    return losses


def check_evaluation(trainer: Trainer, rank: int, kind: str) -> None:
    """Each term is a mean over its items of all batches, as in one pass over all rows; one batch has no label that counts."""
    given = [batch(10), batch(11, 2), batch(12, 9), {**batch(13), "labels": torch.full((5, 7), -100)}]
    whole = {name: torch.cat([item[name] for item in given]) for name in given[0]}
    model = Tagger()
    model.load_state_dict(trainer.program().parameters)
    with torch.no_grad():
        expected = float(model(**whole)["loss"])
    if kind == "rank":
        given = given[rank::2]
    found = trainer.evaluate(given)
    assert found.loss == pytest.approx(expected, rel=1e-6)
    assert found.count == int((whole["labels"] != -100).sum())


def test_an_evaluation_on_one_rank_is_one_pass_over_all_batches() -> None:
    trainer = bg.compile(Tagger(), example=batch(0), backend=Torch(optimizer=SGD(lr=RATE)))
    check_evaluation(trainer, 0, "whole")


def test_micro_batches_give_the_loss_of_the_whole_batch() -> None:
    assert trained(0, "whole", 3, None) == pytest.approx(plain(Tagger()), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "accumulate", "stage"),
    [
        ("rank", 2, 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("whole", 1, 1), ("rank", 1, 0))),
    ],
)
def test_ranks_give_the_loss_of_the_whole_batch(kind: str, accumulate: int, stage: int) -> None:
    expected = plain(Tagger())
    for losses in run_ranks(2, trained, kind, accumulate, stage):
        assert losses == pytest.approx(expected, rel=1e-5)


def test_a_router_loss_goes_by_micro_batch_and_is_reported() -> None:
    model = Tagger(router=True)
    parts = [{name: value[begin:end] for name, value in batch(0).items()} for begin, end in ((0, 2), (2, 5))]
    with torch.no_grad():
        whole = Tagger()(**batch(0))["loss"] - 0.01 * Tagger().tags.weight.square().mean()
        balances = []
        for part in parts:
            shares = model.tags(torch.tanh(model.table(part["ids"]))).softmax(-1).mean((0, 1))
            balances.append(0.01 * (shares * shares).sum())
    backend = Torch(optimizer=SGD(lr=RATE), accumulate=2)
    trainer = bg.compile(model, example=batch(0), backend=backend)
    assert trainer.step(batch(0)).loss == pytest.approx(float(whole + sum(balances) / 2), rel=1e-5)
    assert "computes by itself" in "".join(trainer.report.notes)


class Clamped(nn.Module):
    """The usual mean under a mask, safe without any item."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        error = self.linear(x).squeeze(-1).square()
        return {"loss": (error * mask).sum() / mask.sum().clamp(min=1)}


def masked(seed: int) -> dict[str, torch.Tensor]:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "mask": torch.tensor([0, 0, 1, 0, 1])}


def trained_clamped(rank: int) -> list[float]:
    backend = Torch(optimizer=SGD(lr=RATE), batch="rank", passes=(ZeRO(1),))
    trainer = bg.compile(Clamped(), example=masked(0), backend=backend)
    parts = (slice(0, 2), slice(2, 5))
    return [
        trainer.step({name: value[parts[rank]] for name, value in masked(seed).items()}).loss
        for seed in range(STEPS)
    ]


@pytest.mark.slow
def test_a_rank_without_items_adds_nothing_to_a_clamped_count() -> None:
    model = Clamped()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    expected = []
    for seed in range(STEPS):
        optimizer.zero_grad()
        loss = model(**masked(seed))["loss"]
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    for losses in run_ranks(2, trained_clamped):
        assert losses == pytest.approx(expected, rel=1e-5)
