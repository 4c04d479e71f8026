"""The code of docs/from_bmcook.md runs: one model with all four methods at once, as an engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import bmgraph as bg
from tests.helpers.models import TinyEncoder, tokens
from tests.helpers.paths import code_of


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = code_of("from_bmcook.md")
    torch.manual_seed(0)
    batches = [tokens(3, 8, seed) for seed in range(4)]
    names: dict[str, object] = {"model": TinyEncoder().eval(), "batches": batches}
    exec(code, names)
    engine = bg.load(tmp_path / "cooked")
    asked = [record for record in engine.report.records if not record.within]
    assert [re.split("[{@]", record.text)[0] for record in asked] == ["prune", "distill", "moefy", "quantize"]
    assert all(record.edits for record in asked)
    found = engine(**batches[1])["logits"]
    assert torch.allclose(found, names["engine"](**batches[1])["logits"])  # type: ignore[operator]
