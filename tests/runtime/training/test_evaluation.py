"""`trainer.evaluate`: the mean over all items in eval form, from the tensors where they live."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, Torch
from bmgraph.errors import BmgraphError, InputError
from bmgraph.ir.program import Program
from bmgraph.passes import LoRA, Quantize, ZeRO
from bmgraph.runtime.training.evaluation import Evaluation
from bmgraph.runtime.training.trainer import Trainer
from tests.helpers.ranks import run_ranks
from tests.helpers.step_passes import HalfStorage
from tests.helpers.words import Batch, batch_of, captured_words, words

VALID = [batch_of(seed, rows) for seed, rows in ((20, 4), (21, 7), (22, 1))]


def trained(*passes: object, batch: str = "whole", steps: int = 2) -> Trainer:
    trainer: Trainer = bg.compile(
        captured_words(),
        passes=list(passes),
        backend=Torch(optimizer=SGD(lr=0.5), batch=batch),  # type: ignore[arg-type]
    )
    for seed in range(steps):
        trainer.step(batch_of(seed))
    return trainer


def eager(program: Program, batches: list[Batch]) -> float:
    """The mean loss over all items of a plain model in eval mode, with a program's parameters."""
    model = words().eval()
    model.load_state_dict({**program.parameters, **program.buffers})
    total = count = 0.0
    with torch.no_grad():
        for batch in batches:
            items = int((batch["labels"] != -100).sum())
            total, count = total + float(model(**batch)["loss"]) * items, count + items
    return total / count


@pytest.mark.parametrize(
    "passes",
    [
        pytest.param((), marks=pytest.mark.slow),
        pytest.param((ZeRO(2),), marks=pytest.mark.slow),
        pytest.param((ZeRO(3),), marks=pytest.mark.slow),
        (ZeRO(3), HalfStorage()),
    ],
)
def test_it_is_the_mean_over_all_items_without_dropout(passes: tuple[object, ...]) -> None:
    trainer = trained(*passes)
    found = trainer.evaluate(VALID)
    rounded = any(isinstance(item, HalfStorage) for item in passes)
    expected = eager(trainer.program(), VALID)
    assert found.loss == pytest.approx(expected, rel=3e-3 if rounded else 1e-6)
    assert found.count == sum(int((batch["labels"] != -100).sum()) for batch in VALID)
    assert (found.batches, found.perplexity) == (3, pytest.approx(math.exp(found.loss)))
    before = found.loss
    again, other = trainer.step(batch_of(2)), trained(*passes)
    assert other.step(batch_of(2)) == again  # the evaluation changed nothing
    assert trainer.evaluate(VALID).loss != before


def _on_a_rank(rank: int, stage: int) -> tuple[float, float, float, float]:
    trainer = trained(ZeRO(stage))
    whole = trainer.evaluate(VALID)  # the last batch has one row for two ranks
    own = trained(ZeRO(stage), batch="rank", steps=0)
    uneven = own.evaluate([VALID[rank]] if rank else VALID[:1] + VALID[2:])
    return whole.loss, eager(trainer.program(), VALID), uneven.loss, eager(own.program(), VALID)


@pytest.mark.slow
def test_ranks_share_an_evaluation() -> None:
    for whole, expected, uneven, untrained in run_ranks(2, _on_a_rank, 3):
        assert whole == pytest.approx(expected, rel=1e-6)
        assert uneven == pytest.approx(untrained, rel=1e-6)


class Normed(nn.Module):
    """A batch norm, and a loss that is no cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Batch:
        """x f[B, 3], y f[B, 4] -> loss f[]."""
        return {"loss": nn.functional.mse_loss(self.norm(self.first(x)), y)}


def test_running_statistics_are_read_and_not_changed() -> None:
    torch.manual_seed(0)
    given = [{"x": torch.randn(6, 3), "y": torch.randn(6, 4)} for _ in range(4)]
    trainer = bg.compile(Normed(), example=given[0], backend=Torch(optimizer=SGD(lr=0.1)))
    for batch in given[:2]:
        trainer.step(batch)
    before = {name: value.clone() for name, value in trainer.state.tensors.items()}
    found = trainer.evaluate(given[2:])
    assert found.perplexity is None
    model = Normed().eval()
    model.load_state_dict(trainer.program().tensors())
    with torch.no_grad():
        expected = sum(float(model(**batch)["loss"]) for batch in given[2:]) / 2
    assert found.loss == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in trainer.state.tensors.items())


def test_deltas_on_codes_and_a_loss_of_ones_own() -> None:
    def squares(outputs: Batch, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        errors = outputs["output"].square() * torch.tensor([1.0, 2.0, 0.5])
        return errors.sum(), torch.ones_like(errors).sum()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    batch = {"input": torch.randn(5, 8)}
    trainer = bg.compile(
        model, passes=[Quantize("int8", activations="none", smallest=1), LoRA(r=2, targets=("0", "3")), ZeRO(3)], example=batch,
        backend=Torch(optimizer=SGD(lr=0.1), loss=squares),
    )  # fmt: skip
    for _ in range(3):
        trainer.step(batch)
    with torch.no_grad():
        outputs = trainer.program()(**batch)
    total, count = squares(outputs, batch)
    assert trainer.evaluate([batch]).loss == pytest.approx(float(total / count), rel=1e-6)


def test_what_cannot_be_evaluated_is_refused() -> None:
    trainer = trained(steps=0)
    with pytest.raises(InputError, match="no batches to evaluate"):
        trainer.evaluate([])
    with pytest.raises(InputError, match="the loader gives a tuple"):
        trainer.evaluate([(1, 2)])  # type: ignore[list-item]
    with pytest.raises(InputError, match="no item of the batches counts"):
        trainer.evaluate([{**VALID[0], "labels": torch.full_like(VALID[0]["labels"], -100)}])
    with pytest.raises(BmgraphError, match="missing input 'labels'"):
        trainer.evaluate([{"ids": VALID[0]["ids"]}])
    assert isinstance(trainer.evaluate(VALID), Evaluation)
