"""A short run of the moefy_relu example: the model equals its authors' and the curves are ordered as expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.antibodies import ANTIBODIES, END, PAD, number, trained
from examples.chart import line_chart
from examples.moefy_relu import curves, measure

pytestmark = pytest.mark.slow


def test_the_model_numbers_antibodies_as_its_authors_say() -> None:
    """A heavy chain starts with its type, goes up to position 128, and ends with the sequence."""
    (numbering,) = number(trained(), ANTIBODIES[:1]).tolist()
    heavy, first, last = 133, 4, 131
    assert numbering[1:4] == [heavy, first, first + 1]
    assert numbering[numbering.index(END) - 1] == last
    assert numbering.index(END) == len(ANTIBODIES[0]) + 2
    assert PAD not in numbering


def test_the_oracle_leads_and_the_trained_router_is_far_above_chance() -> None:
    whole, points = measure((8, 32), variants_of_each=3)
    (few, every) = zip(*(curve for curve in curves(points, "agreement").values()))
    oracle, learned, chance = (share for _, share in few)
    assert whole > 0.9
    assert oracle > 0.95 * whole
    assert oracle + 0.02 >= learned > chance + 0.1
    assert all(share == pytest.approx(whole, abs=0.01) for _, share in every)


def test_a_chart_is_drawn(tmp_path: Path) -> None:
    line_chart(tmp_path / "chart.svg", "title", ("x", "y"), {"a": [(0.0, 0.5), (1.0, 2.0)]}, 1.0)
    text = (tmp_path / "chart.svg").read_text()
    assert text.startswith("<svg")
    assert '<polyline points="70.0,190.0 510.0,50.0" fill="none" stroke="#2563eb" stroke-width="2"/>' in text
