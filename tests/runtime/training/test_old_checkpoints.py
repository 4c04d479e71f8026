"""Checkpoints that earlier code saved, on one rank and on two, go on as they did: `tests/fixtures/v2`, of 2026-11-26."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bmgraph.passes import ZeRO
from tests.fixtures import write_checkpoints as write
from tests.helpers.paths import ROOT
from tests.helpers.ranks import run_ranks

FOLDER = ROOT / "tests" / "fixtures" / "v2"
CLOSE = 1e-6
"""For the losses and values of another machine, or of another number of ranks."""


def resumed(rank: int, kind: str, stage: int) -> tuple[torch.Tensor, write.Batch]:
    """The losses after a checkpoint, and the tensors then; without ZeRO for a negative stage."""
    trainer = write.trainer(kind, (ZeRO(stage),) if stage >= 0 else ())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was saved by other versions")
        trainer.load(FOLDER / kind)
    return write.continued(trainer)


def check(kind: str, found: tuple[torch.Tensor, write.Batch]) -> None:
    expected = load_file(FOLDER / "expected.safetensors")
    losses, after = found
    assert torch.allclose(losses, expected[f"{kind}/losses"], rtol=CLOSE)
    for name, value in after.items():
        assert torch.allclose(value, expected[f"{kind}/{name}"], rtol=0, atol=10 * CLOSE), name


@pytest.mark.parametrize("kind", write.KINDS)
@pytest.mark.parametrize("stage", [-1, pytest.param(3, marks=pytest.mark.slow)])
def test_on_one_rank(kind: str, stage: int) -> None:
    check(kind, resumed(0, kind, stage))


def _all(rank: int) -> dict[str, Any]:
    several = [kind for kind, (ranks, _) in write.KINDS.items() if ranks == 2]
    return {f"{kind} {stage}": resumed(rank, kind, stage) for kind in several for stage in (2, 3)}


@pytest.mark.slow
def test_on_two_ranks() -> None:
    for told in run_ranks(2, _all):
        for key, found in told.items():
            check(key.split()[0], found)
