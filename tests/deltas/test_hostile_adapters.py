"""A few of the hostile adapters of benchmarks/attacks.py: each is refused, or loaded as what it holds."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.attacks.adapters import CASES, HARMLESS, attacked, loader, original
from tests.helpers.attacks.watched import refusals


def test_they_are_refused_or_harmless(tmp_path: Path) -> None:
    saved = original(tmp_path / "original")
    names = list(CASES)[::4]
    load = loader([str(saved[0])])
    assert not refusals(load, attacked(saved, tmp_path / "attacked", names), HARMLESS)
