"""The tree of a program's modules: shapes, what trains, deltas, counts; as text, as JSON, and on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.cli.console import CleanConsole
from bmgraph.cli.main import main
from bmgraph.ir.program import Program
from bmgraph.passes import IA3, LoRA, Quantize, SoftPrompt


def test_the_tree_is_golden(program: Program) -> None:
    tuned = bg.Pipeline([LoRA(r=2, targets=("q",), lr_ratio=16)]).run(program)
    text = str(tuned.tree()).splitlines()
    count = sum(item.numel() for item in program.parameters.values())
    assert (
        text[0]
        == f"model: {count + 256:,} parameters, 256 train ({256 / (count + 256):.1%}), {4 * (count + 256):,} bytes"
    )
    assert text[1:3] == [
        "  embed  embedding: 1,600 parameters, none train",
        "    weight: f32[50, 32]  frozen",
    ]
    assert text[3] == "  blocks: 17,344 parameters, 256 train (1.5%)"
    assert text[4] == "    0..1 (2 equal, each): 8,672 parameters, 128 train (1.5%)"
    assert text[5:10] == [
        "      q  attention.q, delta lora (rank 2): 1,184 parameters, 128 train (10.8%)",
        "        weight: f32[32, 32]  frozen",
        "        bias: f32[32]  frozen",
        "        weight_lora_a: f32[2, 32]  trains, of lora",
        "        weight_lora_b: f32[32, 2]  trains at 16 times the learning rate, of lora",
    ]
    assert any(
        line.startswith("      first..second (2 equal, each)  norm: 64 parameters") for line in text
    ), text


def test_counts_are_those_of_the_tensors(program: Program) -> None:
    passes = [Quantize("int8", activations="none", smallest=1), IA3(), SoftPrompt(tokens=3)]
    tuned = bg.Pipeline(passes).run(program, verify="off")
    tree = tuned.tree()
    assert tree.parameters == sum(item.numel() for item in tuned.parameters.values())
    trained = set(tuned.parameters) - tuned.frozen
    assert tree.trained == sum(tuned.parameters[name].numel() for name in trained)
    assert tree.bytes == sum(item.nbytes for item in tuned.tensors().values())
    data = tree.as_json()
    assert json.loads(json.dumps(data)) == data
    embed = next(item for item in data["modules"] if item["path"] == "embed")  # type: ignore[attr-defined]
    assert embed["tensors"][1] == {
        "name": "weight_prompt", "type": "f32[1, 3, 32]", "state": "trains", "elements": 96, "bytes": 384, "family": "prompt",
    }  # fmt: skip
    assert embed["deltas"] == ["prompt (positions in front of the text, and changes no weight)"]
    text = str(tree)
    assert "down  feedforward.down, delta ia3 (scales of 64 inputs)" in text
    assert "weight_codes: i8[32, 64]  frozen" in text


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    plain = bg.capture(model, (torch.randn(2, 6),))
    bg.Pipeline([LoRA(r=2, targets="all-linear")]).run(plain).save(str(tmp_path / "tuned"))  # type: ignore[arg-type]
    monkeypatch.setattr("bmgraph.cli.main.console", CleanConsole())

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bmgraph", "inspect", str(tmp_path / "tuned"), *arguments])
        with pytest.raises(SystemExit):
            main()
        return capsys.readouterr().out

    assert "0..1 (2 equal, each)  linear, delta lora (rank 2): 66 parameters, 24 train" in call()
    data = json.loads(call("--json"))
    assert data["kind"] == "program"
    assert data["modules"]["trained"] == 48
    assert data["roles"]["0.weight"] == "linear"
