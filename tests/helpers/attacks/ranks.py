"""Faults of one rank among several: what goes wrong on it must be raised on all, with its reason, before it waits in vain."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import bmgraph as bg
from bmgraph.backends import SGD, AdamW, Torch
from bmgraph.errors import BmgraphError
from bmgraph.passes import LoRA, ZeRO
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.training.lr_schedules import Linear

Batch = dict[str, torch.Tensor]
SECONDS = 20.0
"""How many seconds of the processor a rank may take to fail, or to be told."""


class Tagger(nn.Module):
    """Words to a class."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, width), nn.Linear(width, 3)
        self.hidden, self.more = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, ids: torch.Tensor, y: torch.Tensor) -> Batch:
        """ids i64[B, S], y i64[B] -> loss f[]."""
        hidden = self.more(torch.relu(self.hidden(self.words(ids)))).mean(1)
        return {"loss": nn.functional.cross_entropy(self.head(hidden), y)}


def rows(count: int = 6, seed: int = 1) -> Batch:
    """A batch that all ranks can make."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "ids": torch.randint(0, 20, (count, 5), generator=generator),
        "y": torch.randint(0, 3, (count,), generator=generator),
    }


def build(
    weights: int = 0,
    width: int = 8,
    passes: tuple[Any, ...] = (),
    example: Batch | None = None,
    **options: Any,
) -> Trainer:
    """A trainer, the same on all ranks but for what a fault changes."""
    torch.manual_seed(weights)
    options = {"optimizer": SGD(lr=0.1), **options}
    trainer: Trainer = bg.compile(
        Tagger(width), passes=[*passes, ZeRO(3)], example=example or rows(seed=0), backend=Torch(**options)
    )
    return trainer


def _of_last(wrong: Callable[[], Any], right: Callable[[], Any], last: bool) -> Any:
    return wrong() if last else right()


def _built(**options: Any) -> Callable[[bool, Path], Any]:
    """The last rank builds its trainer with other options."""
    return lambda last, folder: _of_last(lambda: build(**options), build, last)


def _called(
    wrong: Callable[[Trainer, Path], Any], right: Callable[[Trainer, Path], Any]
) -> Callable[[bool, Path], Any]:
    """The last rank makes another call on a trainer that all built alike."""

    def attack(last: bool, folder: Path) -> Any:
        trainer = build()
        trainer.step(rows(seed=0))
        return wrong(trainer, folder) if last else right(trainer, folder)

    return attack


def _step(batch: Batch) -> Callable[[Trainer, Path], Any]:
    return lambda trainer, folder: trainer.step(batch)


def _set(name: str, value: Any) -> Callable[[Trainer, Path], Any]:
    def attack(trainer: Trainer, folder: Path) -> Any:
        setattr(trainer, name, value)
        return trainer.step(rows())

    return attack


def _other_checkpoint(trainer: Trainer, folder: Path) -> Any:
    """All saved two checkpoints; the last rank loads the other one."""
    return trainer.load(folder / "other")


def _checkpoints(wrong: Callable[[Trainer, Path], Any]) -> Callable[[bool, Path], Any]:
    def attack(last: bool, folder: Path) -> Any:
        trainer = build()
        trainer.step(rows(seed=0))
        trainer.save(folder / "one")
        trainer.step(rows())
        trainer.save(folder / "other")
        return wrong(trainer, folder) if last else trainer.load(folder / "one")

    return attack


def _twice(trainer: Trainer, folder: Path) -> Any:
    trainer.steps += 1
    return trainer.step(rows())


def _failing(outputs: Batch, inputs: Batch) -> Any:
    raise ValueError("the loss function of this rank fails")


def _with(name: str, value: Any) -> Batch:
    batch = rows()
    changed = batch[name].clone()
    changed.view(-1)[-1] = value
    return {**batch, name: changed}


class Rows(Dataset[Batch]):
    """Rows that a loader's worker reads, the fourth of which may be damaged."""

    def __init__(self, damaged: bool) -> None:
        self.damaged, self.whole = damaged, rows(8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Batch:
        if self.damaged and index == 3:
            raise ValueError("row 3 of this rank is damaged")
        return {name: value[index] for name, value in self.whole.items()}


def _fit_by_worker(damaged: bool) -> Callable[[Trainer, Path], Any]:
    """Trains on what a process of the loader reads."""
    return lambda trainer, folder: trainer.fit(DataLoader(Rows(damaged), 2, num_workers=1), 4, log_every=0)


def _step_on_all(trainer: Trainer, folder: Path) -> Any:
    return trainer.step(rows())


FAULTS: dict[str, Callable[[bool, Path], Any]] = {
    "another optimizer": _built(optimizer=AdamW(lr=0.1)),
    "another learning rate": _built(optimizer=SGD(lr=0.2)),
    "another momentum": _built(optimizer=SGD(lr=0.1, momentum=0.9)),
    "another schedule": _built(schedule=Linear(warmup=2, steps=10)),
    "another clipping": _built(clip_norm=1.0),
    "another seed": _built(seed=3),
    "other weights": _built(weights=1),
    "another width": _built(width=4),
    "another pass": _built(passes=(LoRA(r=2, targets=("*hidden*",)),)),
    "another way to give batches": _built(batch="rank"),
    "a pass that fails": _built(passes=(LoRA(r=2, targets=("*nowhere*",)),)),
    "a loss that fails": _built(loss=_failing),
    "an example that does not fit": _built(example={"ids": torch.zeros(6, 5)}),
    "a batch in another order": _called(
        _step({name: value.flip(0) for name, value in rows().items()}), _step_on_all
    ),
    "one other label": _called(_step(_with("y", 2 - int(rows()["y"][-1]))), _step_on_all),
    "an id out of range": _called(_step(_with("ids", 20)), _step_on_all),
    "a batch of another dtype": _called(_step({**rows(), "y": rows()["y"].float()}), _step_on_all),
    "a batch without labels": _called(_step({"ids": rows()["ids"]}), _step_on_all),
    "fewer rows": _called(_step(rows(4)), _step_on_all),
    "a worker of a loader that fails": _called(_fit_by_worker(True), _fit_by_worker(False)),
    "a skipped step": _called(_twice, _step_on_all),
    "a learning rate changed later": _called(_set("optimizer", SGD(lr=0.3)), _step_on_all),
    "a clipping changed later": _called(_set("clip_norm", 0.1), _step_on_all),
    "a schedule changed later": _called(_set("schedule", Linear(warmup=3, steps=9)), _step_on_all),
    "a save where others step": _called(lambda trainer, folder: trainer.save(folder / "own"), _step_on_all),
    "a program where others step": _called(lambda trainer, folder: trainer.program(), _step_on_all),
    "a load of another checkpoint": _checkpoints(_other_checkpoint),
    "a load of nothing": _checkpoints(lambda trainer, folder: trainer.load(folder / "nowhere")),
    "a step where others load": _checkpoints(_step_on_all),
}


def attack(rank: int, size: int, names: list[str], folder: str) -> dict[str, tuple[str, float]]:
    """What this rank raised in each fault of the last rank, and after how many seconds of the processor; "" where it went on."""
    found = {}
    for index, name in enumerate(names):
        place = Path(folder) / f"{index}"
        os.makedirs(place, exist_ok=True)
        begin = time.process_time()
        try:
            FAULTS[name](rank == size - 1, place)
            error = ""
        except BmgraphError as raised:
            error = f"{type(raised).__name__}: {raised}"
        except (RuntimeError, IndexError, ValueError, TypeError) as raised:
            error = f"UNCLEAR {type(raised).__name__}: {raised}"
        found[name] = (error, time.process_time() - begin)
    return found
