"""The code of docs/from_openprompt.md runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from bmgraph.prompting.vocabulary import Vocabulary
from tests.helpers.paths import code_of
from tests.helpers.prompted_models import fills
from tests.helpers.prompting import SPECIAL, word_tokenizer

BLOCKS = code_of("from_openprompt.md")


def names() -> dict[str, object]:
    """What the page takes as given."""
    special = {**SPECIAL, "eos": "[SEP]"}
    return {"model": fills(), "tokenizer": Vocabulary.of(word_tokenizer(), special)}


@pytest.mark.slow
def test_all_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = names()
    for block in BLOCKS:
        exec(block, given)
    said = capsys.readouterr().out
    assert said.count("'positive'") + said.count("'negative'") == 8
