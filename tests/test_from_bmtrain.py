"""The code of docs/from_bmtrain.md runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.paths import code_of
from tests.helpers.words import batch_of, words


@pytest.mark.slow
def test_the_code_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = code_of("from_bmtrain.md")
    batches = [batch_of(seed) for seed in range(3)]
    names: dict[str, object] = {"model": words(), "batches": batches, "valid": batches[:1]}
    for block in blocks:
        exec(block, names)
    assert "hidden.weight" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "run").glob("step-*")) == [
        "step-00000006",
        "step-00000008",
    ]
