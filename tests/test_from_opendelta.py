"""The code of docs/from_opendelta.md runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.models import TinyEncoder, tokens
from tests.helpers.paths import code_of


class Classifier(TinyEncoder):
    """The tiny encoder with a loss over classes."""

    def forward(  # type: ignore[override]
        self, ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        logits = super().forward(ids, attention_mask)["logits"][:, 0]
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = code_of("from_opendelta.md")
    torch.manual_seed(0)
    batches = [{**tokens(3, 8, seed), "labels": torch.tensor([1, 0, 2])} for seed in range(2)]
    names: dict[str, object] = {"model": Classifier(layers=1), "batches": batches}
    exec(code, names)
    tuned, trainer = names["tuned"], names["trainer"]
    expected = trainer.program()(**batches[0])["logits"]  # type: ignore[attr-defined]
    assert torch.allclose(tuned(**batches[0])["logits"], expected, atol=1e-6)  # type: ignore[operator]
    assert sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir()) < 40_000
