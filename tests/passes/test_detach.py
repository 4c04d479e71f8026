"""Detach: what the linears computed before is there again, for every family, and another delta can take the place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import PassError
from bmgraph.passes import IA3, Adapter, Deltas, Detach, LoadDelta, LoRA, Quantize
from tests.helpers.deltas import trained


def test_deltas_are_attached_detached_and_exchanged(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    program = bg.capture(model, {"input": torch.randn(4, 8)})
    small = bg.Pipeline([Quantize("int8", activations="none", smallest=1)]).run(program)
    batch = {"input": torch.randn(4, 8)}
    both = bg.Pipeline([LoRA(r=2, targets=("*",)), Adapter(2, targets=("2",))]).run(small)
    both = trained(bg.Pipeline([IA3(targets=("2",), feedforward_modules=("2",))]).run(both), size=0.5)
    bare = bg.Pipeline([Detach()]).run(both)
    assert torch.equal(bare(**batch)["output"], small(**batch)["output"])
    assert set(bare.parameters) == set(small.parameters)
    part = bg.Pipeline([Detach(targets=("0.*",))]).run(both)
    assert {name for name in both.parameters if name not in part.parameters} == {
        "0.weight_lora_a",
        "0.weight_lora_b",
    }
    for seed in (1, 2):
        trained(bg.Pipeline([LoRA(r=2, targets=("*",))]).run(program), seed).save_delta(
            str(tmp_path / f"d{seed}")
        )
    resources = {"one": tmp_path / "d1", "two": tmp_path / "d2"}
    first, second = (
        bg.Pipeline([LoadDelta(name)]).run(program, resources=resources) for name in ("one", "two")
    )
    swapped = bg.Pipeline([Detach(), LoadDelta("two")]).run(first, resources=resources)
    assert torch.equal(swapped(**batch)["output"], second(**batch)["output"])
    rows = bg.Pipeline([Deltas(("one",))]).run(program, resources=resources)
    with pytest.raises(PassError, match="its delta is for rows that choose their own"):
        bg.Pipeline([Detach()]).run(rows)
    with pytest.raises(PassError, match="no delta to detach"):
        bg.Pipeline([Detach()]).run(program)
    whole = bg.Pipeline([LoRA(r=2, targets=("0",), modules_to_save=("2",))]).run(program)
    with pytest.raises(PassError, match=r"2\.bias, 2\.weight trained whole with the delta"):
        bg.Pipeline([Detach()]).run(whole)
