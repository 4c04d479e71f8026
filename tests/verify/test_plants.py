"""Planted wrong passes are stopped at default settings; the passes themselves are not."""

from __future__ import annotations

from pathlib import Path

import pytest

import bmgraph as bg
from bmgraph.errors import BmgraphError
from tests.helpers.plants import ENDS, EXACT, OWN, PLANTS, Plant

QUICK = {plant.name for plant in (*EXACT[::4], *OWN[::3])}


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(plant, id=plant.name, marks=[] if plant.name in QUICK else [pytest.mark.slow])
        for plant in PLANTS
    ],
)
def test_a_planted_fault_is_stopped(plant: Plant, tmp_path: Path) -> None:
    with pytest.raises(BmgraphError, match="pass faulty"):
        plant.run(tmp_path)


@pytest.mark.parametrize("kind", ENDS)
def test_without_the_fault_nothing_is_stopped(kind: str, tmp_path: Path) -> None:
    on, item, resources = ENDS[kind]
    Plant(kind, on, item, lambda program: None, resources).run(tmp_path)


def test_there_are_ninety() -> None:
    assert len({plant.name for plant in PLANTS}) >= 90
    assert bg.__name__
