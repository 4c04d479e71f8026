"""optimizer_in_backward: the same numbers as with all gradients kept, and what fails in the middle is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.errors import BmgraphError, InputError
from bmgraph.passes import Offload, ZeRO
from bmgraph.runtime.training.trainer import Trainer
from tests.helpers.ranks import run_ranks


class Rooted(nn.Module):
    """Where `x` is zero the loss is finite, and so is the gradient of `late`, but not that of `early`."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        root: torch.Tensor = self.early(x).square().sum(1).sqrt()
        return self.late(y).square().sum(1) + root


def total(outputs: Any, inputs: Any) -> Any:
    """The loss of Rooted."""
    return outputs["output"].sum(), torch.ones_like(outputs["output"]).sum()


def given(x: float) -> dict[str, torch.Tensor]:
    """A batch of Rooted."""
    return {"x": torch.full((4, 3), x), "y": torch.linspace(0, 1, 12).reshape(4, 3)}


def rooted(*passes: Any, in_backward: bool = True, **options: Any) -> Trainer:
    torch.manual_seed(0)
    backend = Torch(optimizer=AdamW(lr=1e-2), optimizer_in_backward=in_backward, **{"loss": total, **options})
    made: Trainer = bg.compile(
        Rooted(), example=given(1.0), passes=list(passes), backend=backend, verify="structure"
    )
    return made


def compare(*passes: Any, **options: Any) -> tuple[Trainer, Trainer]:
    """Trainers after three equal steps, with all gradients kept and without."""
    kept, taken = (rooted(*passes, in_backward=way, **options) for way in (False, True))
    for x in (1.0, 2.0, 3.0):
        assert kept.step(given(x)) == taken.step(given(x))
    found = taken.program().parameters
    for name, value in kept.program().parameters.items():
        assert torch.equal(value, found[name]), name
    return kept, taken


@pytest.mark.parametrize(
    ("passes", "options"),
    [
        pytest.param((), {}, marks=pytest.mark.slow),
        ((ZeRO(3), Offload("optimizer")), {}),
        pytest.param((ZeRO(3),), {"accumulate": 2}, marks=pytest.mark.slow),
    ],
)
def test_the_same_numbers(passes: tuple[Any, ...], options: dict[str, Any]) -> None:
    compare(*passes, **options)


def test_gradients_are_not_kept() -> None:
    kept, taken = (rooted(ZeRO(3), in_backward=way).plan for way in (False, True))
    assert taken.gradients < kept.gradients


def test_what_fails_in_the_middle_needs_a_checkpoint(tmp_path: Path) -> None:
    trainer = rooted(ZeRO(3))
    trainer.step(given(1.0))
    trainer.save(tmp_path / "whole")
    expected = trainer.step(given(2.0)).loss
    with pytest.raises(InputError, match=r"gradient of 'early.*' is not finite.*were updated already"):
        trainer.step(given(0.0))
    for call in (lambda: trainer.step(given(1.0)), trainer.program):
        with pytest.raises(
            InputError, match=r"failed when . tensors were updated already: load a checkpoint"
        ):
            call()
    trainer.load(tmp_path / "whole")
    assert trainer.step(given(2.0)).loss == expected
    before = trainer.program().parameters
    with pytest.raises(InputError, match=r"the loss of this batch is nan.*nothing was changed"):
        trainer.step(given(float("nan")))
    for name, value in trainer.program().parameters.items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_norm": 1.0}, "clip_norm=1.0: the norm of all gradients must be known before"),
        ({"on_nan": "skip"}, "on_nan='skip'"),
        ({"precision": "fp16"}, "precision='fp16'"),
    ],
)
def test_what_needs_all_gradients_first(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rooted(**options)


def _ranks(rank: int) -> list[str]:
    _, gathered = compare(ZeRO(3))
    _, kept = compare(ZeRO(3, keep=10**6))
    assert gathered.step(given(4.0)).loss == kept.step(given(4.0)).loss
    told = []
    try:
        rooted(ZeRO(1))
    except InputError as error:
        told.append(str(error))
    trainer = rooted(ZeRO(3))
    trainer.step(given(1.0))
    batch = given(1.0)
    batch["x"][2:] = 0  # the rows of rank 1
    for _ in range(2):
        try:
            trainer.step(batch)
        except BmgraphError as error:
            told.append(str(error))
    return told


@pytest.mark.slow
def test_two_ranks() -> None:
    for rank, told in enumerate(run_ranks(2, _ranks)):
        assert "does not go with ZeRO(1) and ZeRO(2)" in told[0], rank
        assert "is not finite" in told[1]
        assert "although the last step failed" in told[2] or "failed when" in told[2]
