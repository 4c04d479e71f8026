"""20 steps on 1 to 4 ranks give the loss curve of plain PyTorch on the same global batches, whatever is combined.

The combinations are a pairwise covering design: any two values of two options that go together stand in one row at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import SGD, AdamW, Torch
from bmgraph.pass_manager.pass_base import StepPass
from bmgraph.passes import Offload, ParallelHead, Remat, ZeRO
from tests.helpers.ranks import run_ranks
from tests.helpers.training import IGNORED, Batch, captured_to_train, labelled, toy

STEPS, ROWS, CLIP = 20, 9, 1.0
EXACT = 1e-5

OPTIONS: dict[str, tuple[Any, ...]] = {
    "ranks": (1, 2, 3, 4),
    "name": ("gpt2", "llama", "bert", "t5"),
    "stage": (0, 1, 2, 3),
    "remat": ("none", "auto", "layers"),
    "prefetch": (0, 1, 2),
    "offload": (False, True),
    "accumulate": (1, 2),
    "batch": ("whole", "rank"),
    "optimizer": ("adamw", "sgd"),
    "head": (False, True),
}


@dataclass(frozen=True)
class Case:
    """One row of the design."""

    ranks: int
    name: str
    stage: int
    remat: str
    prefetch: int
    offload: bool
    accumulate: int
    batch: str
    optimizer: str
    head: bool

    @property
    def passes(self) -> list[StepPass]:
        found: list[StepPass] = [Remat(self.remat), ZeRO(self.stage, prefetch=self.prefetch)]
        found += [ParallelHead()] * self.head + [Offload("optimizer")] * self.offload
        return found

    @property
    def pairs(self) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
        return set(combinations([(item.name, getattr(self, item.name)) for item in fields(self)], 2))


def makes_sense(options: dict[str, Any]) -> bool:
    """ParallelHead is for stage 3, and for a head without a bias."""
    return not options["head"] or (options["stage"] == 3 and options["name"] != "bert")


@cache
def design() -> tuple[Case, ...]:
    """Rows that cover all pairs: each is the one, among those that hold a pair not covered yet, that covers most."""
    every = [
        Case(**options)
        for values in product(*OPTIONS.values())
        if makes_sense(options := dict(zip(OPTIONS, values)))
    ]
    pairs = {case: case.pairs for case in every}
    missing = set().union(*pairs.values())
    found = []
    while missing:
        best = max(every, key=lambda case: len(pairs[case] & missing))
        found.append(best)
        missing -= pairs[best]
    return tuple(found)


def batches(name: str) -> Iterator[Batch]:
    """Global batches of several lengths; in some the first third of the rows has no label that counts."""
    for seed in range(STEPS):
        batch = labelled(name, ROWS, 9 + 2 * (seed % 3), seed=seed)
        if seed % 4 == 1:
            batch["labels"][: ROWS // 3 + 1] = IGNORED
        yield batch


def own_rows(batch: Batch, rank: int, size: int) -> Batch:
    """Uneven shares: the last rank has what others leave."""
    begin, end = rank, ROWS if rank == size - 1 else rank + 1
    if size == 2:
        begin, end = (0, 4) if rank == 0 else (4, ROWS)
    return {key: value[begin:end] for key, value in batch.items()}


def curve(case: Case, rank: int, saved: str) -> list[float]:
    rule = AdamW(lr=1e-3, weight_decay=0.0) if case.optimizer == "adamw" else SGD(lr=0.05, momentum=0.9)
    backend = Torch(optimizer=rule, clip_norm=CLIP, accumulate=case.accumulate, batch=case.batch)
    trainer = bg.compile(
        bg.load(f"{saved}/{case.name}"), passes=case.passes, backend=backend, verify="structure"
    )
    shares = case.batch == "rank" and case.ranks > 1
    return [
        trainer.step(own_rows(batch, rank, case.ranks) if shares else batch).loss
        for batch in batches(case.name)
    ]


def on_ranks(rank: int, cases: tuple[Case, ...], saved: str) -> list[list[float]]:
    return [curve(case, rank, saved) for case in cases]


@cache
def plain(name: str, optimizer: str) -> list[float]:
    model = toy(name).train()
    rule: torch.optim.Optimizer = (
        torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        if optimizer == "adamw"
        else torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    )
    losses = []
    for batch in batches(name):
        rule.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        rule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("size", OPTIONS["ranks"])
def test_curves_are_those_of_plain_pytorch(size: int, half: int, tmp_path: Path) -> None:
    cases = tuple(case for case in design() if case.ranks == size)[half::2]
    for name in {case.name for case in cases}:
        captured_to_train(name).save(tmp_path / name)
    told = (
        run_ranks(size, on_ranks, cases, str(tmp_path)) if size > 1 else [on_ranks(0, cases, str(tmp_path))]
    )
    wrong = {}
    for index, case in enumerate(cases):
        expected = plain(case.name, case.optimizer)
        assert abs(expected[-1] - expected[0]) > 0.02
        for losses in (found[index] for found in told):
            far = max(abs(one / other - 1) for one, other in zip(losses, expected, strict=True))
            print(f"{case}: {far:.1e}")
            if not far < EXACT:
                wrong[case] = far
    assert not wrong
