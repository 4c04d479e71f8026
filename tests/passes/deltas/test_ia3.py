"""IA3: equal to PEFT's in outputs and gradients, the naive formula, merged exactly, on any weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.deltas.registry import deltas_of
from bmgraph.errors import BundleError, PassError
from bmgraph.ir.program import Program
from bmgraph.passes import IA3, LoadDelta, LoRA, Merge, Quantize
from bmgraph.verify.metrics import relative_error
from tests.helpers.models import TinyEncoder, tokens
from tests.helpers.peft_models import EXACT, check_with_peft, stirred
from tests.helpers.sweep import sweep
from tests.passes.test_lora import fused


def test_the_rewritten_graph_is_golden() -> None:
    program = bg.capture(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), (torch.randn(3, 6),))
    item = IA3(targets=("0", "2"), feedforward_modules=("2",))
    tuned = bg.Pipeline([item]).run(program)
    stamp = f"pass={item}"
    assert str(tuned) == (
        "forward(input: f32[batch, 6]):\n"
        "  %linear = aten.linear(%input, 0.weight, 0.bias) : f32[batch, 4]\n"
        f"  %mul = aten.mul.Tensor(%linear, 0.weight_ia3_l) : f32[batch, 4]  # site=0.weight part=delta.ia3.total {stamp}\n"
        "  %relu = aten.relu(%mul) : f32[batch, 4]\n"
        "  %mul_1 = aten.mul.Tensor(%relu, 2.weight_ia3_l_input) : f32[batch, 4]"
        f"  # site=2.weight part=delta.ia3_input.total {stamp}\n"
        "  %linear_1 = aten.linear(%mul_1, 2.weight, 2.bias) : f32[batch, 3]\n"
        "  return output=%linear_1\n"
    )


@pytest.mark.slow
def test_it_is_that_of_peft(model: TinyEncoder, program: Program, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tuned = stirred(bg.Pipeline([IA3(modules_to_save=("head",))]).run(program))
    assert {delta.site.rpartition(".")[0][-1] for delta in deltas_of(tuned.graph)} == {"k", "v", "n"}
    config = peft.IA3Config(target_modules=["k", "v", "down"], feedforward_modules=["down"])
    check_with_peft(model, program, tuned, tmp_path, config)


def test_a_fresh_one_changes_nothing_and_is_merged_exactly(program: Program) -> None:
    fresh = bg.Pipeline([IA3()]).run(program)
    assert torch.equal(fresh(**tokens())["logits"], program(**tokens())["logits"])
    assert fresh.structure().feedforwards == program.structure().feedforwards
    assert fresh.structure().roles == program.structure().roles
    for passes in ([LoRA(r=2, roles=("feedforward.*", "attention.v"))], []):
        tuned = stirred(bg.Pipeline([*passes, IA3(), *passes]).run(program))  # type: ignore[list-item]
        merged = bg.Pipeline([Merge()]).run(tuned)
        assert set(merged.parameters) == set(program.parameters)
        assert relative_error(merged(**tokens())["logits"], tuned(**tokens())["logits"]) < EXACT


@pytest.mark.parametrize("activations", sweep(["none", "dynamic"], ["dynamic"]))
def test_it_sits_on_codes_before_and_after(activations: str, program: Program, tmp_path: Path) -> None:
    quantize = Quantize("int8", activations=activations, smallest=1)  # type: ignore[arg-type]
    codes = bg.Pipeline([quantize]).run(program)
    tuned = stirred(bg.Pipeline([IA3()]).run(codes))
    tuned.save_delta(str(tmp_path / "d"))
    again = bg.Pipeline([LoadDelta("d")]).run(codes, resources={"d": tmp_path / "d"})
    assert torch.equal(again(**tokens())["logits"], tuned(**tokens())["logits"])
    after = bg.Pipeline([LoadDelta("d"), quantize]).run(program, resources={"d": tmp_path / "d"})
    assert {delta.site for delta in deltas_of(after.graph)} == {
        delta.site for delta in deltas_of(tuned.graph)
    }
    assert relative_error(after(**tokens())["logits"], tuned(**tokens())["logits"]) < 0.05


def test_some_outputs_of_a_linear() -> None:
    model, program = fused()
    tuned = stirred(bg.Pipeline([IA3(roles=("attention.k", "attention.v"))]).run(program))
    x = torch.randn_like(program.example["x"])
    scales = torch.ones(32)
    for delta in deltas_of(tuned.graph):
        values = delta.change(tuned).tensors
        scales = torch.where(values["rows"][:, 0], values["l"], scales)
    assert (scales != 1).tolist() == [False] * 16 + [True] * 16
    found, linear = tuned(x=x)["output"], model.get_submodule("all")  # they share weights
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight.mul_(scales[:, None])
        if linear.bias is not None:
            linear.bias.mul_(scales)
        assert relative_error(found, model(x)) < EXACT


def test_what_cannot_be_read_is_named(program: Program, tmp_path: Path) -> None:
    stirred(bg.Pipeline([IA3()]).run(program)).save_delta(str(tmp_path / "d"))
    (tmp_path / "d" / "manifest.json").unlink()
    config = tmp_path / "d" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "of_tomorrow": 3}))
    with pytest.raises(BundleError, match=r"of_tomorrow=3, an option that is not known here.*family 'ia3'"):
        bg.Pipeline([LoadDelta("d")]).run(program, resources={"d": tmp_path / "d"})
    with pytest.raises(PassError, match="feedforward_modules='dwon' fits no site; near it: "):
        bg.Pipeline([IA3(feedforward_modules=("dwon",))]).run(program)


def test_a_delta_beside_scales_of_the_input_reads_the_input_as_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(3, 6)
    program = bg.capture(model, (x,))
    stirred(bg.Pipeline([LoRA(r=2, alpha=2, targets=("2",))]).run(program)).save_delta(str(tmp_path / "d"))
    scaled = stirred(bg.Pipeline([IA3(targets=("2",), feedforward_modules=("2",))]).run(program))
    found = bg.Pipeline([LoadDelta("d")]).run(scaled, resources={"d": tmp_path / "d"})
    values = found.parameters
    with torch.no_grad():
        inner = model[:2](x)
        expected = model[2](inner * values["2.weight_ia3_l_input"])
        expected += inner @ values["2.weight_lora_a"].T @ values["2.weight_lora_b"].T
    assert relative_error(found(input=x)["output"], expected) < EXACT
    merged = bg.Pipeline([Merge()]).run(found)
    assert relative_error(merged(input=x)["output"], expected) < EXACT
