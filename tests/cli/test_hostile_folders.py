"""A few of the hostile folders of models of benchmarks/attacks.py: each is refused, or loaded as what it holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.attacks.folders import HARMLESS, attacked, loader, original
from tests.helpers.attacks.watched import refusals

SHORT = (
    "a weight missing", "a weight of integers", "a weight in two files", "an index out of the folder", "a billion layers",
    "a width of 2**40", "code of the folder", "a tokenizer that is noise", "a weight of 64 bits", "weights that are a device",
)  # fmt: skip


def test_they_are_refused_or_harmless(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    saved = original(tmp_path / "original")
    load = loader([])
    assert not refusals(load, attacked(saved, tmp_path / "attacked", list(SHORT)), HARMLESS)
