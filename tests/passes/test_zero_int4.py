"""A LoRA on int4 weights trains: on one rank and sharded over two as in one plain process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.ir.program import Program
from bmgraph.passes import LoRA, Quantize, ZeRO
from tests.helpers.ranks import run_ranks
from tests.helpers.training import batches, captured_to_train, eager_deltas, toy

STEPS, RATE = 4, 1e-2


def adapted(symmetric: bool) -> Program:
    program = captured_to_train("llama")
    return bg.Pipeline([Quantize("int4", group=16, symmetric=symmetric), LoRA(r=4, targets=("*",))]).run(
        program, max_drift=2.0
    )


def naive(program: Program) -> list[float]:
    """The losses of a plain eager loop."""
    model, deltas = eager_deltas(toy("llama"), program)
    rule = torch.optim.AdamW(deltas.values(), lr=RATE)
    found = []
    for batch in batches("llama", STEPS):
        rule.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        rule.step()
        found.append(loss.item())
    return found


def _train(rank: int, saved: str) -> list[float]:
    trainer = bg.compile(bg.load(saved), passes=[ZeRO(3)], backend=Torch(optimizer=AdamW(lr=RATE)))
    return [trainer.step(batch).loss for batch in batches("llama", STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "symmetric"), [(1, True), (2, True), (2, False)])
def test_a_delta_trains_beside_packed_codes(size: int, symmetric: bool, tmp_path: Path) -> None:
    program, saved = adapted(symmetric), str(tmp_path / "program")
    program.save(saved)
    for losses in run_ranks(size, _train, saved) if size > 1 else [_train(0, saved)]:
        assert losses == pytest.approx(naive(program), abs=1e-5)
