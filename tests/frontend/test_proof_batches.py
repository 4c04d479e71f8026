"""Proofs of large examples: small batches where they say as much, one run of the program where both forms are one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.frontend import capture as capturing
from bmgraph.frontend.proof_batches import FEW_ROWS, SHORT, proof_batches
from bmgraph.ir.eval_form import forms_agree
from bmgraph.ir.kept_module import KeptModule
from tests.helpers.backwards import Clip


class Scores(nn.Module):
    """Adds the mean of the row; `how` names what is done besides."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how, self.table, self.out = how, nn.Embedding(50, 6), nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """i64[B, S] -> f[B, S, 3]."""
        h = self.table(ids)
        if self.how == "long" and ids.shape[1] > 24:
            h = h * 2.0
        elif self.how == "clip":
            h = Clip.apply(h)
        elif self.how == "write":
            h = h + 0.0
            with torch.no_grad():
                h.clamp_(min=0)
        return self.out(h + h.mean(1, keepdim=True))


def ids(rows: int = 9, length: int = 40) -> torch.Tensor:
    return torch.arange(rows * length).reshape(rows, length) * 7 % 50


def sizes(model: nn.Module, example: torch.Tensor) -> list[tuple[int, ...]]:
    program = bg.capture(model, (example,), prove=False)
    return [tuple(batch["ids"].shape) for batch in proof_batches(program)[0]]


def test_the_batch_of_other_sizes_is_small_and_the_former_one_is_tried_after_it() -> None:
    small, large = (FEW_ROWS, SHORT), (10, 43)
    assert sizes(Scores(), ids()) == [small, small, large, large]
    assert sizes(Scores(), ids(2, 5)) == [(3, 8)] * 2


def test_sizes_at_which_a_guard_fails_are_not_taken_for_small_ones() -> None:
    program = bg.capture(Scores("long"), (ids(),))
    low = program.ranges["sequence"].low if program.inputs[0].shape[1] == "sequence" else 40
    assert low > SHORT  # the other branch is no part of the program
    assert all(length > SHORT for _, length in sizes(Scores("long"), ids()))


def test_gradients_of_a_large_example_are_compared_on_a_small_batch() -> None:
    assert bg.capture(Scores(), (ids(),), prove="training").backward.endswith(f"train, on {FEW_ROWS}x{SHORT}")


@pytest.mark.parametrize(
    ("how", "message"), [("clip", "not linear, such as one that clips"), ("write", "differs from eager")]
)
def test_another_backward_is_found_on_a_large_example(how: str, message: str) -> None:
    assert message in bg.capture(Scores(how), (ids(),), prove="training").training


class Chosen(Scores):
    """Reads its second table for ids that only the last rows of the example hold."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """i64[B, S] -> f[B, S, 3]."""
        return super().forward(ids) * torch.where(ids == 49, self.scale, 1.0)[..., None]


def test_a_parameter_without_a_gradient_in_the_small_batch_is_compared_on_the_example() -> None:
    example = torch.zeros(9, 40, dtype=torch.long)
    example[-1, -1] = 49
    assert bg.capture(Chosen(), (example,), prove="training").backward.endswith("that train")


@pytest.mark.parametrize(("extra", "runs"), [(nn.Dropout(0.5), 2), (nn.BatchNorm1d(4), 2)])
def test_one_run_is_compared_with_both_modes_where_both_forms_are_one(
    extra: nn.Module, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    run, module = KeptModule.run, bg.Program.module
    monkeypatch.setattr(KeptModule, "run", lambda *args: (ran.append("eval"), run(*args))[1])
    monkeypatch.setattr(
        bg.Program, "module", lambda self, training=False: (ran.append("training"), module(self, training))[1]
    )
    program = bg.capture(nn.Sequential(nn.Linear(4, 4), extra), (torch.randn(3, 4),))
    agree = isinstance(extra, nn.Dropout)
    assert forms_agree(program) is agree
    assert ran == ["eval"] * runs + ["training"] * (0 if agree else runs)


class TwiceInEval(nn.Module):
    """Another function in eval mode, with no operator that a training form would keep."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f[B] -> f[B]."""
        return x * (1.0 if self.training else 2.0)


def test_both_modes_of_the_model_are_run() -> None:
    program = bg.capture(TwiceInEval(), (torch.randn(3),))
    assert program.training
    assert "eval form differs" in program.training


def test_a_program_that_differs_in_training_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    check = capturing.check_eval_form

    def spoiled(program: Any, model: nn.Module, *rest: Any, **named: Any) -> Any:
        found = check(program, model, *rest, **named)
        model.register_forward_hook(lambda module, args, out: out * 3 if module.training else out)
        return found

    monkeypatch.setattr(capturing, "check_eval_form", spoiled)
    program = bg.capture(nn.Linear(4, 2), (torch.randn(3, 4),))
    assert "training form differs" in program.training
