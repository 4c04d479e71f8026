"""A few of the attacks of benchmarks/attacks.py: each is refused or harmless, in time and memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from tests.helpers.attacks.loading import bombs, kill_savers, mutated
from tests.helpers.attacks.savers import load_beside_a_saver
from tests.helpers.attacks.watched import Watched
from tests.helpers.bundles import toy

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("originals")
    toy().save(folder / "program")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 2))
    bg.compile(model, example=(torch.randn(3, 64),), backend="onnx").save(folder / "engine")
    return [folder / "program", folder / "engine"]


@pytest.fixture(scope="module")
def watched(originals: list[Path]):  # type: ignore[no-untyped-def]
    process = Watched(originals)
    yield process
    process.close()


def test_mutations(originals: list[Path], watched: Watched, tmp_path: Path) -> None:
    outcomes = [watched.load(name, folder) for name, folder in mutated(originals, tmp_path, 40)]
    assert not [item for item in outcomes if not item.held]


def test_bombs(originals: list[Path], watched: Watched, tmp_path: Path) -> None:
    outcomes = [watched.load(name, folder) for name, folder in bombs(*originals, tmp_path, 12)]
    assert not [item for item in outcomes if not item.held]


def test_kills(tmp_path: Path) -> None:
    assert list(kill_savers(tmp_path / "bundle", 2)) == ["", ""]


@pytest.mark.parametrize("kind", ["program", pytest.param("checkpoint", marks=pytest.mark.slow)])
def test_loads_beside_a_saver(kind: str, tmp_path: Path) -> None:
    assert not [wrong for wrong, _ in load_beside_a_saver(kind, tmp_path, 20) if wrong]
