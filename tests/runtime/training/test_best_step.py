"""`fit(best=, patience=)`: the best evaluated step stays and is resumed, and waiting for a better one ends."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import bmgraph as bg
from bmgraph.backends import SGD, Torch
from bmgraph.errors import InputError
from bmgraph.runtime.training.best_step import Best, BestStep
from bmgraph.runtime.training.data_position import DataPosition
from bmgraph.runtime.training.evaluation import Evaluation
from bmgraph.runtime.training.fit import FitOptions
from bmgraph.runtime.training.trainer import Trainer
from tests.helpers.words import batch_of, captured_words

ALL = [batch_of(seed) for seed in range(3)]
SHARES = {"right": (0.1, 0.5, 0.3, float("nan"), 0.5, 0.9)}


class Right:
    """A figure of which more is better; what it is stands in `SHARES`."""

    names = ("right",)

    def __call__(self, outputs: Any, inputs: Any) -> Any:
        raise AssertionError("not evaluated here")

    def figures(self, sums: Any) -> Any:
        raise AssertionError("not evaluated here")


@cache
def only() -> tuple[Trainer, str]:
    """A trainer for all tests, and its checkpoint before the first step."""
    trainer: Trainer = bg.compile(captured_words(), backend=Torch(optimizer=SGD(lr=0.1)), verify="off")
    folder = tempfile.mkdtemp()
    trainer.save(folder)
    return trainer, folder


def built(monkeypatch: pytest.MonkeyPatch, losses: tuple[float, ...]) -> Trainer:
    """A trainer as if it were new, whose evaluation after step k is entry k - 1."""
    trainer, begin = only()
    trainer.sections[:] = [one for one in trainer.sections if not isinstance(one, (BestStep, DataPosition))]
    trainer.load(begin)

    def evaluate(loader: object, measure: object = None) -> Evaluation:
        place = trainer.steps - 1
        found = {name: given[place] for name, given in SHARES.items()} if measure is not None else {}
        return Evaluation(losses[place], 1, 1, None, found)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    return trainer


def saved(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith("step-"))


def test_the_best_stays_beside_the_newest_and_a_resumed_run_stops_at_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = (0.9, 0.4, 0.6, 0.5, 0.5, 0.3)
    options: dict[str, Any] = {"eval": ALL, "eval_every": 1, "keep": 1, "patience": 3}
    whole = built(monkeypatch, losses).fit(ALL, 6, save=tmp_path / "whole", **options)
    assert whole.best == Best(2, "loss", 0.4, tmp_path / "whole" / "step-00000002")
    assert (whole.steps, saved(tmp_path / "whole")) == (5, ["step-00000002", "step-00000005"])
    assert (
        "stopped after step 5 of 6: 3 evaluations were no better (the best loss is 0.4000, of step 2)"
        in whole.notes
    )
    options |= {"save": tmp_path / "run", "resume": "auto"}
    first = built(monkeypatch, losses).fit(ALL, 4, **options)
    assert saved(tmp_path / "run") == ["step-00000002", "step-00000004"]
    again = built(monkeypatch, losses).fit(ALL, 6, **options)
    assert first.best == again.best == Best(2, "loss", 0.4, tmp_path / "run" / "step-00000002")
    assert again.steps == 5
    third = built(monkeypatch, losses).fit(ALL, 6, **options)  # had stopped already
    assert (third.steps, third.loss) == (5, None)


def test_of_a_figure_of_the_measure_more_is_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = built(monkeypatch, (0.9, 0.4, 0.6, 0.5, 0.5, 0.3))
    done = trainer.fit(ALL, 5, eval=ALL, eval_every=1, measure=Right(), best="right", save=tmp_path, keep=1)
    assert done.best == Best(2, "right", 0.5, tmp_path / "step-00000002")
    assert done.evaluation is not None
    assert done.evaluation.measures == {"right": 0.5}
    trainer.load(tmp_path / "step-00000002")
    assert trainer.steps == 2
    done = trainer.fit(ALL, 4, eval=ALL, eval_every=1, best="loss")  # by another figure: looked for anew
    assert done.best == Best(4, "loss", 0.5, None)


def test_an_evaluation_that_is_not_finite_is_never_best(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = built(monkeypatch, (float("nan"), float("inf"), 0.5))
    done = trainer.fit(ALL, 3, eval=ALL, eval_every=1, patience=2)
    assert (done.steps, done.best) == (2, None)
    assert "2 evaluations were no better (none was finite)" in done.notes[-1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"patience": 0, "eval": ALL}, "patience=0: give a whole number of 1 or more"),
        ({"patience": 2}, "patience=2 needs eval="),
        ({"best": "loss"}, "best=loss needs eval="),
        ({"best": "rigth", "eval": ALL, "measure": Right()}, "best='rigth': evaluations have no such figure; did you mean 'right'"),
        ({"best": "right", "eval": ALL}, r"no such figure \(loss\)"),
    ],
)  # fmt: skip
def test_what_is_not_valid(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        FitOptions(1, **options)
