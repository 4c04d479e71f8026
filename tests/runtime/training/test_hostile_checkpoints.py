"""The hostile checkpoints of benchmarks/attacks.py: each is refused, or loaded as what it holds."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.attacks.checkpoints import CASES, HARMLESS, attacked, loader, original
from tests.helpers.attacks.watched import refusals

HEAVY = {"many moments", "a header of many tensors", "a computation of lines alone"}


def test_they_are_refused_or_harmless(tmp_path: Path) -> None:
    saved = original(tmp_path / "original")
    names = [name for name in CASES if name not in HEAVY]
    load = loader([str(saved[0])])
    assert not refusals(load, attacked(saved, tmp_path / "attacked", names), HARMLESS)
