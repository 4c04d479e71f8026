"""The page on Fit: its code runs."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from bmgraph.passes.fit.plan import FitPlan
from bmgraph.runtime.engine_base import Engine
from tests.helpers.paths import ROOT


@pytest.mark.slow
def test_the_code_of_the_page_runs() -> None:
    pytest.importorskip("onnxruntime")
    page = (ROOT / "docs" / "fit.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    names: dict[str, object] = {
        "model": model,
        "batches": [{"input": torch.randn(8, 64)} for _ in range(2)],
    }
    exec(code, names)
    engine, plan = names["engine"], names["plan"]
    assert isinstance(engine, Engine)
    assert engine.report.bytes is not None
    assert engine.report.bytes <= 60_000
    assert isinstance(plan, FitPlan)
    assert plan.chosen is not None
    assert plan.chosen.files == engine.report.bytes
