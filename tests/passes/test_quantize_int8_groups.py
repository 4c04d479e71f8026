"""Quantize("int8", group=): the naive formula, an engine beside it, a tied head, deltas, texts of earlier versions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import Onnx
from bmgraph.errors import InputError, PassError
from bmgraph.ir.program import Program
from bmgraph.ops.block_codes import unpack_codes
from bmgraph.pass_manager.pass_spec import parse_passes
from bmgraph.pass_manager.target import Target
from bmgraph.passes import LoRA, Merge, Quantize, known_passes
from bmgraph.verify.metrics import relative_error
from tests.helpers.deltas import trained
from tests.helpers.models import TinyDecoder, enlarge, tokens

GROUP = 16


def rounded_weight(weight: torch.Tensor) -> torch.Tensor:
    """The weight f[N, K] with each group of a row in 8 bits: its value of the largest magnitude gets -128."""
    found = torch.zeros_like(weight)
    for row, values in enumerate(weight):
        for first in range(0, len(values), GROUP):
            part = values[first : first + GROUP]
            step = max(part.tolist(), key=abs) / -128
            found[row, first : first + GROUP] = torch.clamp(torch.round(part / step), -128, 127) * step
    return found


def rounded_input(x: torch.Tensor) -> torch.Tensor:
    """x f[S, K] with each group of a row in 8 bits around 0."""
    found = torch.zeros_like(x)
    for first in range(0, x.shape[1], GROUP):
        part = x[:, first : first + GROUP]
        step = part.abs().amax(1, keepdim=True) / 127
        found[:, first : first + GROUP] = torch.round(part / step) * step
    return found


def test_an_engine_computes_the_formula(tmp_path: Path) -> None:
    import onnx

    torch.manual_seed(0)
    linear = nn.Linear(40, 24)
    nn.init.normal_(linear.weight)
    small = bg.Pipeline([Quantize("int8", group=GROUP)]).run(bg.capture(linear, (torch.randn(3, 40),)))
    weight = rounded_weight(linear.weight.detach())
    codes, scale = small.parameters["weight_codes"], small.parameters["weight_scale"]
    assert (codes.dtype, codes.shape, scale.shape) == (torch.uint8, (24, 3, GROUP), (24, 3))
    found = unpack_codes(codes, 8, 40) * scale.repeat_interleave(GROUP, 1)[:, :40]
    torch.testing.assert_close(found, weight)
    engine = bg.compile(
        linear, [Quantize("int8", group=GROUP)], example=(torch.randn(3, 40),), backend="onnx"
    )
    engine.save(tmp_path / "engine")
    nodes = onnx.load(str(tmp_path / "engine" / "model.onnx"), load_external_data=False).graph.node
    (given,) = [
        {item.name: item.i for item in node.attribute} for node in nodes if node.op_type == "MatMulNBits"
    ]
    assert (given["bits"], given["block_size"], given["accuracy_level"]) == (8, GROUP, 4)
    again = bg.load(tmp_path / "engine")
    for rows in (1, 5):
        x = torch.randn(rows, 40)
        expected = rounded_input(x) @ weight.T + linear.bias.detach()
        assert relative_error(again(input=x)["output"], expected) < 1e-5


def test_a_tied_head_behind_a_cache() -> None:
    torch.manual_seed(0)
    model = TinyDecoder(width=48, heads=4, hidden=64, layers=2, vocabulary=50).eval()
    model.head.weight = model.embed.weight
    enlarge(model)
    program = bg.capture(model, tokens())
    passes = [Quantize("int8", group=32, embeddings=8)]
    engine = bg.compile(program, passes, backend=Onnx(generate=True))
    assert not any(edit.what.startswith("something else") for edit in engine.report.records[0].declined)
    rounding = Quantize("int8", group=32, embeddings=8, activations="blocks")
    target = Target("onnx", ("blocks",), weight_scales=("block",))
    rounded, batch = bg.Pipeline([rounding]).run(program, target=target), tokens(2, 9, 1)
    kept = batch["attention_mask"].bool()
    found, expected, exact = (item(**batch)["output"][kept] for item in (engine, rounded, program))
    assert relative_error(found, expected) < 1e-5
    assert relative_error(expected, exact) < 0.1
    prompts = [[3, 14, 15, 9], [6, 5, 35, 8]]
    ids = engine.generate(prompts, max_new_tokens=6, eos=())
    for prompt, new in zip(prompts, ids):  # what was generated is what the whole sequence scores best
        row = torch.tensor([prompt + new])
        scores = engine(ids=row, attention_mask=torch.ones_like(row))["output"][0]
        for place, item in enumerate(new, len(prompt) - 1):
            assert scores[place, item] > scores[place].max() - 0.05 * scores[place].std()


def test_deltas_are_merged_into_such_codes(program: Program) -> None:
    codes = bg.Pipeline([Quantize("int8", group=GROUP, activations="none")]).run(program)
    tuned = trained(bg.Pipeline([LoRA(r=2, targets=("q",))]).run(codes), size=0.1)
    with pytest.raises(PassError, match=r"q.weight: its weight is int8 codes.*requantize=0.02"):
        bg.Pipeline([Merge()]).run(tuned)
    done = bg.Pipeline([Merge(requantize=0.02)]).run(tuned)
    assert (
        done.parameters["blocks.0.q.weight_codes"].shape == codes.parameters["blocks.0.q.weight_codes"].shape
    )
    batch = tokens()
    assert relative_error(done(**batch)["logits"], tuned(**batch)["logits"]) < 0.02


def test_texts_of_earlier_versions_had_one_scale_for_each_output() -> None:
    known = known_passes()
    assert parse_passes("quantize@2{group=64}", known) == [Quantize("int8")]
    assert parse_passes("quantize{group=64}", known, recorded=True) == [Quantize("int8", smooth=False)]
    assert parse_passes("quantize@2{scheme=int4,group=64}", known) == [Quantize("int4", group=64)]
    assert parse_passes("quantize{group=64}", known) == [Quantize("int8", group=64)]
    with pytest.raises(InputError, match=r"quantize@2 with embeddings=8 in groups of 64"):
        parse_passes("quantize@2{embeddings=8,group=64}", known)
    with pytest.raises(InputError, match="int8 in groups takes blocks or none"):
        Quantize("int8", group=32, activations="static")
