"""ParallelHead: losses and parameters of plain PyTorch on one and several ranks, and what it refuses by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, AdamW, Torch
from bmgraph.errors import BmgraphError, OrderError, PassError
from bmgraph.passes import ParallelHead, Remat, ZeRO
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.verify.metrics import relative_error
from tests.helpers.ranks import run_ranks
from tests.helpers.training import batches, captured_to_train, naive_losses, toy

STEPS, RATE = 4, 0.1
EXACT = 3e-6


def trainer_of(name: str, *passes: Any) -> Trainer:
    made: Trainer = bg.compile(
        captured_to_train(name),
        passes=list(passes),
        backend=Torch(optimizer=SGD(lr=RATE)),
    )
    return made


def _train(rank: int, names: tuple[str, ...], *before: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        trainer = trainer_of(name, *before, ZeRO(stage=3), ParallelHead())
        text = str(trainer.state)
        losses = [trainer.step(batch).loss for batch in batches(name, STEPS)]
        bad = dict(batches(name, 1)[0])
        bad["labels"] = bad["labels"].clone()
        bad["labels"][0, 2] = 99  # of the first rank alone
        with pytest.raises((BmgraphError, IndexError), match="99"):
            trainer.step(bad)
        vocabulary = max(
            (place for place in trainer.state.places.values() if place.align > 1),
            key=lambda place: place.size,
        )
        found[name] = losses, trainer.program().parameters, vocabulary.share * vocabulary.ranks, text
    return found


def check(name: str, told: list[dict[str, Any]]) -> None:
    model = toy(name).train()
    rule = torch.optim.SGD(model.parameters(), lr=RATE)
    expected = naive_losses(model, rule, batches(name, STEPS))
    plain = dict(model.named_parameters())
    for found in told:
        losses, parameters, held, text = found[name]
        assert losses == pytest.approx(expected, rel=EXACT)
        assert "parallel_cross_entropy" in text
        assert "_log_softmax" not in text
        for key, value in parameters.items():
            assert relative_error(value, plain[key].detach()) < 3e-4, (
                key
            )  # AdamW magnifies rounding of small gradients
            assert torch.equal(value, told[0][name][1][key]), key
        assert held >= 99 * 32 or len(told) == 1  # a row of padding: two ranks do not divide 99 rows


@pytest.mark.slow
def test_one_rank_has_the_losses_of_plain_pytorch_also_where_activations_are_computed_again() -> None:
    check("llama", [_train(0, ("llama",), Remat("auto"))])


@pytest.mark.parametrize(
    ("size", "names"),
    [
        (2, ("gpt2",)),
        pytest.param(2, ("llama", "t5"), marks=pytest.mark.slow),
        pytest.param(3, ("llama", "gpt2", "t5"), marks=pytest.mark.slow),
        pytest.param(4, ("llama", "gpt2"), marks=pytest.mark.slow),
    ],
)
def test_ranks_have_the_losses_of_plain_pytorch(size: int, names: tuple[str, ...]) -> None:
    told = run_ranks(size, _train, names)
    for name in names:
        check(name, told)


class Classifier(nn.Module):
    """A head with a bias, class weights or smoothing, whose logits may be read twice."""

    def __init__(self, bias: bool = False, twice: bool = False, **options: Any) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 6, bias=bias)
        self.twice, self.options = twice, options

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x f[B, 4], y i64[B] -> loss f[]."""
        logits = self.head(self.hidden(x).relu())
        more = logits.square().sum() if self.twice else 0.0
        return nn.functional.cross_entropy(logits, y, **self.options) + more


def refused(model: nn.Module, *passes: Any) -> str:
    example = {"x": torch.randn(4, 4), "y": torch.tensor([0, 1, 5, 2])}
    with pytest.raises(BmgraphError) as told:
        bg.compile(model, example=example, passes=passes, backend=Torch(optimizer=AdamW(), loss="output"))
    return str(told.value)


@pytest.mark.parametrize(
    ("model", "stage", "message"),
    [
        (Classifier(bias=True), 3, "not from one linear without a bias"),
        (Classifier(twice=True), 3, "is no mean that is split into sum and count"),
        (Classifier(label_smoothing=0.1), 3, "label smoothing"),
        (Classifier(weight=torch.ones(6)), 3, "class weights"),
        (Classifier(), 2, "is whole on every rank: ParallelHead needs it split, by ZeRO"),
        (nn.Sequential(), 3, "0 cross-entropies over classes"),
    ],
)
def test_what_it_does_not_fit_is_refused_by_name(model: nn.Module, stage: int, message: str) -> None:
    if isinstance(model, nn.Sequential):
        model = _Squares()
    found = refused(model, ZeRO(stage=stage), ParallelHead())
    assert "ParallelHead" in found
    assert message in found


class _Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x f[B, 4], y i64[B] -> loss f[]."""
        return (self.linear(x)[:, 0] - y).square().mean()


def test_it_needs_zero_before() -> None:
    with pytest.raises((OrderError, PassError), match="sharded"):
        trainer_of("llama", ParallelHead())
