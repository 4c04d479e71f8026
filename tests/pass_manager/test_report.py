"""The report: bytes and FLOPs of each pass, times before and after, and what saved nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import Torch
from bmgraph.ir.pass_record import Cost, Record
from bmgraph.ir.program import Program
from bmgraph.pass_manager.report import Report
from bmgraph.passes import KVCache, LoRA, Prune, Quantize, Shrink
from tests.helpers.models import tiny_decoder, tokens


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    return bg.capture(model, (torch.randn(8, 64),))


def test_bytes_flops_and_times_stand_in_the_report(program: Program) -> None:
    passes = [Shrink(ffn=0.5), Quantize("int8", activations="none")]
    report = bg.compile(program, passes, backend=Torch()).report
    text = str(report)
    rows = {line.split("│")[1].strip(): line.split("│")[3:5] for line in text.splitlines() if "│" in line}
    before, shrunk = 2 * 8 * 2 * 64 * 256, 2 * 8 * 2 * 64 * 128
    assert [float(cell) for cell in rows["(before)"]] == pytest.approx([0.13, before / 1e9], rel=0.05)
    assert [float(cell) for cell in rows["shrink{ffn=0.5}"]] == pytest.approx([0.066, shrunk / 1e9], rel=0.05)
    assert float(rows["quantize@4{activations=none}"][0]) == pytest.approx(0.018, rel=0.05)
    assert report.milliseconds is not None
    assert report.milliseconds_before is not None
    assert min(report.milliseconds, report.milliseconds_before) > 0
    assert f"{report.milliseconds_before:.2f} ms before (the program on torch)" in text
    assert "on 8x64," in text
    assert "saved nothing" not in text
    assert report.as_json()["milliseconds"] == report.milliseconds


def test_what_saved_nothing_is_told(program: Program) -> None:
    text = str(bg.compile(program, [Prune("2:4")], backend=Torch(), max_drift=2.0).report)
    told = " ".join(text.split())
    assert "prune saved nothing on torch: 0.00052 GFLOPs before and 0.00052 after it, and no fewer" in told
    text = str(bg.compile(program, [LoRA(r=2, roles=("*",))], backend=Torch()).report)
    assert "saved nothing" not in text  # it is not meant to


def test_a_pass_within_another_is_not_told_apart() -> None:
    cost = Cost(1, 4, 8)
    outer = Record("quantize", "approximate", before=cost, after=cost, saves=True)
    inner = Record("shrink", "approximate", before=cost, after=cost, saves=True, within="quantize")
    text = str(Report((inner, outer)))
    assert "quantize saved nothing on torch" in text
    assert "shrink saved nothing" not in text
    assert Record.from_json(outer.as_json()) == outer


@pytest.mark.slow
def test_times_are_left_out_where_the_engine_takes_other_inputs(program: Program) -> None:
    engine = bg.compile(bg.capture(tiny_decoder(), tokens()), [KVCache()], backend=Torch())
    assert engine.report.milliseconds is None
    assert "time of a call" not in str(engine.report)
