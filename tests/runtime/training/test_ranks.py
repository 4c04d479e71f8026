"""What fails on one rank fails on all, at once, and the next step goes on; each rank may bring rows of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, Torch
from bmgraph.errors import BmgraphError
from bmgraph.passes import ZeRO
from bmgraph.runtime.training.trainer import Trainer
from tests.helpers.ranks import run_ranks
from tests.helpers.training import naive_losses

Batch = dict[str, torch.Tensor]
RATE = 0.1


class Tagger(nn.Module):
    """Three units of parameters, so that a rank can fail between collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor, y: torch.Tensor) -> Batch:
        """ids i64[B, S], y i64[B] -> loss f[]."""
        hidden = torch.relu(self.hidden(self.words(ids))).mean(1)
        return {"loss": nn.functional.cross_entropy(self.head(hidden), y)}


def tagger() -> Tagger:
    torch.manual_seed(0)
    return Tagger()


def rows(count: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "ids": torch.randint(0, 20, (count, 5), generator=generator),
        "y": torch.randint(0, 3, (count,), generator=generator),
    }


def trainer_of(batch: str = "whole") -> Trainer:
    trainer: Trainer = bg.compile(
        tagger(), passes=[ZeRO(3)], example=rows(6, 0), backend=Torch(optimizer=SGD(lr=RATE), batch=batch)
    )
    return trainer


def changed(batch: Batch, name: str, value: int) -> Batch:
    """A batch with one value changed, in the last row: on two ranks it is the second's."""
    other = batch[name].clone()
    other.view(-1)[-1] = value
    return {**batch, name: other}


def told(function: Any, *arguments: Any) -> str:
    try:
        function(*arguments)
    except (BmgraphError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _failures(rank: int, folder: str) -> dict[str, Any]:
    trainer = trainer_of()
    losses = [trainer.step(rows(6, 1)).loss]
    found: dict[str, Any] = {
        "label": told(trainer.step, changed(rows(6, 2), "y", 7)),
        "id": told(trainer.step, changed(rows(6, 2), "ids", 20)),
        "batches": told(trainer.step, rows(6, rank)),
        "missing": told(trainer.step, rows(6, 2) if rank else {}),
    }
    losses.append(trainer.step(rows(6, 2)).loss)
    trainer.save(Path(folder, "one"))
    trainer.step(rows(6, 3))
    trainer.save(Path(folder, "two"))
    found["checkpoints"] = told(trainer.load, Path(folder, ("one", "two")[rank]))
    own = trainer_of(batch="rank")
    return {
        **found,
        "steps": trainer.steps,
        "losses": losses,
        "own": [own.step(rows(4 - rank, 10 * step + rank)).loss for step in range(2)],
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, _failures, str(tmp_path_factory.mktemp("failures")))


@pytest.mark.parametrize(
    ("what", "messages"),
    [
        ("label", ("BmgraphError: rank 1: Target 7 is out of bounds", "IndexError: Target 7 is out of bounds")),
        ("id", ("InputError: input 'ids' holds 20 at [5, 4]",) * 2),
        ("batches", ("rank 1 was given another batch than rank 0",) * 2),
        ("missing", ("missing input 'ids'", "rank 0: missing input 'ids'")),
        ("checkpoints", ("BundleError: rank 1 read another checkpoint from",) * 2),
    ],
)  # fmt: skip
def test_both_ranks_are_told(ranks: list[dict[str, Any]], what: str, messages: tuple[str, str]) -> None:
    for found, message in zip(ranks, messages):
        assert message in found[what]


def test_the_steps_between_are_those_of_one_process(ranks: list[dict[str, Any]]) -> None:
    model = tagger()
    rule = torch.optim.SGD(model.parameters(), lr=RATE)
    expected = naive_losses(model, rule, [rows(6, 1), rows(6, 2)])
    for found in ranks:
        assert found["losses"] == pytest.approx(expected, abs=1e-6)
        assert found["steps"] == 3


def test_rows_of_each_ranks_own_are_one_batch(ranks: list[dict[str, Any]]) -> None:
    model = tagger()
    both = [[rows(4 - rank, 10 * step + rank) for rank in range(2)] for step in range(2)]
    whole = [{name: torch.cat([own[name] for own in pair]) for name in ("ids", "y")} for pair in both]
    expected = naive_losses(model, torch.optim.SGD(model.parameters(), lr=RATE), whole)
    for found in ranks:
        assert found["own"] == pytest.approx(expected, abs=1e-6)
