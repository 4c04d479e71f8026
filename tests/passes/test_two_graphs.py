"""Every pass on an encoder-decoder of two graphs does what it does on the same model as one graph."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.ir.program import Program
from bmgraph.passes import (
    IA3,
    L0,
    QAT,
    Adapter,
    BitFit,
    Cast,
    ClassRows,
    Compacter,
    Deltas,
    Detach,
    Distill,
    DoRA,
    Fit,
    Freeze,
    KVCache,
    LoadDelta,
    LoRA,
    LowRankAdapter,
    Merge,
    MoEfy,
    ParallelAdapter,
    Prefix,
    Prune,
    Quantize,
    Relufy,
    Rotate,
    Shrink,
    Smooth,
    SoftPrompt,
    SoftTokens,
    SplitOutliers,
    StoreCodes,
    Stream,
    VeRA,
    WeightedDelta,
    known_passes,
)
from bmgraph.verify.metrics import relative_error
from tests.helpers.deltas import trained
from tests.helpers.sweep import sweep
from tests.helpers.two_graphs import batch, captured

TUNED = (LoRA(r=2, roles=("attention.*", "feedforward.*")),)
RECIPES: dict[str, tuple[Any, ...]] = {
    "weights": (Quantize("int8", activations="none"),),
    "static": (Quantize("int8", activations="static"),),
    "dynamic": (Quantize("int8", activations="dynamic"),),
    "prune": (Prune(),),
    "outliers": (SplitOutliers(),),
    "smooth": (Smooth(),),
    "rotate": (Rotate(),),
    "shrink": (Shrink(ffn=0.25, heads=0.5),),
    "l0": (L0(ffn=0.25, heads=0.5),),
    "lora": TUNED,
    "dora": (DoRA(r=2),),
    "ia3": (IA3(),),
    "vera": (VeRA(r=4),),
    "bitfit": (BitFit(),),
    "adapter": (Adapter(4),),
    "parallel": (ParallelAdapter(4),),
    "low rank": (LowRankAdapter(4),),
    "compacter": (Compacter(4, division=2),),
    "load": (LoadDelta("delta"),),
    "deltas": (Deltas(("delta",)),),
    "detach": (LoadDelta("delta"), Detach()),
    "weighted": (WeightedDelta((("delta", 0.5),)),),
    "freeze": (Freeze(except_=("*.bias",)),),
    "merge": (LoadDelta("delta"), Merge()),
    "prompt": (SoftPrompt(3),),
    "prefix": (Prefix(3),),
    "soft_tokens": (SoftTokens((3, None)),),
    "class_rows": (ClassRows(((3,), (4, 5))),),
    "moefy": (MoEfy(experts=4, active=2),),
    "cast": (Cast("fp32"),),
    "distill": (Distill(steps=1, on="outputs"),),
    "cache": (KVCache(),),
    "qat": (QAT("int8", activations="static"),),
    "codes": (QAT("int8", activations="none"), StoreCodes()),
    "relufy": (Relufy(steps=0),),
    "stream": (Stream("32MB"),),
    "fit": (Fit(bytes="24KB", over=("shrink{ffn=0.25}", "quantize{activations=none}")),),
    "several": (Prune(), Quantize("int8", activations="none"), LoRA(r=2)),
}
QUICK = {"static", "shrink", "lora", "moefy", "cache"}
"""The ways in which passes read several graphs: weights, widths, deltas, experts, and a graph that is cut."""


@cache
def both(dtype: torch.dtype = torch.float32) -> tuple[Program, Program]:
    """The model as one graph, and as two."""
    model, two = captured(dtype=dtype)
    return bg.capture(model.eval(), batch()), two


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tmp_path_factory.mktemp("delta") / "saved"
    trained(bg.Pipeline(TUNED).run(both()[0]), size=0.05).save_delta(str(folder))
    return {
        "delta": str(folder),
        "calibration": [batch(1), batch(2)],
        "teacher": both()[0],
        "text": [batch(3)],
    }


def test_every_pass_has_a_row() -> None:
    tried = {type(item).__name__ for passes in RECIPES.values() for item in passes}
    assert {kind.__name__ for kind in known_passes().values() if kind.acts_on == "model"} <= tried


@pytest.mark.parametrize("name", sweep(RECIPES, QUICK))
def test_a_pass_sees_all_graphs(name: str, resources: Mapping[str, Any], tmp_path: Path) -> None:
    whole, two = both(torch.bfloat16 if name == "cast" else torch.float32)
    pipeline = bg.Pipeline(RECIPES[name])
    expected = pipeline.run(whole, resources=resources)
    found = pipeline.run(two, resources=resources)
    assert [record.text for record in found.history] == [record.text for record in expected.history]
    for one, other in zip(found.history, expected.history):
        assert {(item.site, item.what) for item in one.edits} == {
            (item.site, item.what) for item in other.edits
        }
        assert {item.site for item in one.declined} == {item.site for item in other.declined}
    given = dict(batch(4))
    if name == "deltas":
        given["delta"] = torch.tensor([0, 1, 1])
    scores = next(iter(expected(**given).values()))
    bound = 2e-2 if name in ("static", "dynamic", "cast") else 1e-5
    assert relative_error(found(**given)[found.outputs[0].name], scores) < bound
    found.save(str(tmp_path / "saved"))
    loaded = bg.load(tmp_path / "saved")
    assert str(loaded) == str(found)
    assert torch.equal(loaded(**given)[found.outputs[0].name], found(**given)[found.outputs[0].name])
    if name != "cache":
        assert set(found.graphs) == {"encode", "forward"}
        # the memory is an output of `encode`, whose norm keeps its scale
        own = {"cross.k.weight_smoothing"} if name == "smooth" else set()
        assert set(found.parameters) == set(expected.parameters) | own
