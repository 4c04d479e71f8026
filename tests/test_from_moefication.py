"""The code of docs/from_moefication.md runs: a model with GELU becomes one of experts, as an engine."""

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
    (code,) = code_of("from_moefication.md")
    torch.manual_seed(0)
    batches = [tokens(3, 8, seed) for seed in range(4)]
    names: dict[str, object] = {"model": TinyEncoder().eval(), "batches": batches}
    exec(code, names)
    engine = bg.load(tmp_path / "moefied")
    asked = [record for record in engine.report.records if not record.within]
    assert [re.split("[{@]", record.text)[0] for record in asked] == ["relufy", "moefy", "distill"]
    assert "% of all activation mass, the best choice" in asked[1].edits[0].what
    assert torch.allclose(engine(**batches[1])["logits"], names["engine"](**batches[1])["logits"])  # type: ignore[operator]
