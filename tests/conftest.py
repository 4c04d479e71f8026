"""Captured toys that many tests share."""

from __future__ import annotations

import pytest
import torch

import bmgraph as bg
from bmgraph.ir.program import Program
from tests.helpers.models import TinyEncoder, tiny_encoder, tokens


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def model() -> TinyEncoder:
    return tiny_encoder()


@pytest.fixture(scope="session")
def program(model: TinyEncoder) -> Program:
    """Captured once: tests take clones, since passes leave the program that they are given."""
    return bg.capture(model, tokens())


@pytest.fixture(scope="session")
def batches() -> list[dict[str, torch.Tensor]]:
    return [tokens(4, 8, seed) for seed in range(4)]
