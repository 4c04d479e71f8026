"""LoRA's variants and DoRA: equal to PEFT's in outputs and gradients, files go both ways, merged exactly, refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.analysis.interpreter import evaluate
from bmgraph.deltas.registry import deltas_of
from bmgraph.errors import BundleError, InputError, PassError
from bmgraph.ir.program import Program
from bmgraph.passes import DoRA, LoadDelta, LoRA, Merge, Quantize
from bmgraph.verify.metrics import relative_error
from tests.helpers.deltas import Stored, trained
from tests.helpers.models import TinyEncoder, tokens
from tests.helpers.peft_models import EXACT, check_with_peft, stirred
from tests.passes.test_lora import fused


@pytest.mark.parametrize(
    ("item", "theirs"),
    [
        pytest.param(LoRA(r=4, alpha=6, rslora=True, rank_pattern=(("blocks.0.q", 2),), alpha_pattern=(("v", 3.0),)),
         {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"blocks.0.q": 2}, "alpha_pattern": {"v": 3}}, marks=pytest.mark.slow),
        (LoRA(r=2, bias="all"), {"r": 2, "bias": "all"}),
        (DoRA(r=3, alpha=5), {"r": 3, "lora_alpha": 5, "use_dora": True}),
    ],
    ids=["rslora and patterns", "biases", "dora"],
)  # fmt: skip
def test_it_is_that_of_peft(
    item: LoRA | DoRA, theirs: dict[str, Any], model: TinyEncoder, program: Program, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    tuned = stirred(bg.Pipeline([item]).run(program))
    config = peft.LoraConfig(target_modules=["q", "v"], **theirs)
    check_with_peft(model, program, tuned, tmp_path, config)


def test_a_fresh_one_changes_nothing_and_is_merged_exactly(program: Program) -> None:
    fresh = bg.Pipeline([DoRA(r=2, targets=("q", "down"))]).run(program)
    assert torch.equal(fresh(**tokens())["logits"], program(**tokens())["logits"])
    tuned = stirred(fresh)
    assert relative_error(tuned(**tokens())["logits"], program(**tokens())["logits"]) > 1e-2
    merged = bg.Pipeline([Merge()]).run(tuned)
    assert set(merged.parameters) == set(program.parameters)
    assert relative_error(merged(**tokens())["logits"], tuned(**tokens())["logits"]) < EXACT


@pytest.mark.parametrize("form", ["stored", "int8", "dropout", "rows"])
def test_any_weight_takes_it(form: str) -> None:
    """The naive formula: rows of W + scale * B A with the norms m."""
    x = torch.randn(5, 16)
    if form == "rows":
        program = fused()[1]
        given = {"x": torch.randn_like(program.example["x"])}
    else:
        program = bg.capture(Stored() if form == "stored" else nn.Linear(16, 24), (x,))
        given = {program.inputs[0].name: x}
    if form == "int8":
        program = bg.Pipeline([Quantize("int8", activations="none")]).run(program)
    options: dict[str, Any] = (
        {"roles": ("attention.q", "attention.v")} if form == "rows" else {"targets": "*"}
    )
    fresh = bg.Pipeline([DoRA(r=3, alpha=4, dropout=0.1 if form == "dropout" else 0.0, **options)]).run(
        program
    )
    tuned = stirred(fresh)
    (delta,) = deltas_of(tuned.graph)
    values = delta.change(tuned).tensors
    by_hand = program.clone()
    linear = next(node for node in by_hand.graph.nodes if node.name == delta.linear.name)
    expression: Any = linear.args[1]
    weight = evaluate(by_hand, expression)
    moved = weight + 4 / 3 * (values["b"] @ values["a"])
    moved = moved * (values["magnitude"] / moved.square().sum(1).sqrt())[:, None]
    if form == "rows":
        moved = torch.where(values["rows"], moved, weight)
        assert not values["rows"].all()
    with by_hand.graph.inserting_before(linear):
        by_hand.parameters["by_hand"] = moved
        linear.args = (linear.args[0], by_hand.graph.get_attr("by_hand"), *linear.args[2:])
    (name,) = (spec.name for spec in program.outputs)
    assert relative_error(tuned(**given)[name], by_hand(**given)[name]) < EXACT
    assert tuned.structure().roles == program.structure().roles


def test_the_norm_gets_no_gradient() -> None:
    """Section 4.3 of the paper: the gradient of B sees the norm as a constant."""
    x = torch.randn(5, 6)
    tuned = stirred(bg.Pipeline([DoRA(r=2, alpha=2, targets=("*",))]).run(bg.capture(nn.Linear(6, 4), (x,))))
    module = tuned.module(training=True)
    module(x)[0].square().sum().backward()
    a, b, m, w, bias = (
        tuned.parameters[name].clone().requires_grad_()
        for name in ("weight_dora_a", "weight_dora_b", "weight_dora_magnitude", "weight", "bias")
    )
    moved = w + b @ a
    y = nn.functional.linear(x, moved * (m / moved.norm(dim=1).detach())[:, None], bias)
    y.square().sum().backward()
    found = {name: item.grad for name, item in module.named_parameters()}
    for name, value in (("a", a), ("b", b), ("magnitude", m)):
        assert relative_error(found[f"weight_dora_{name}"], value.grad) < EXACT


def test_a_linear_with_one_takes_no_other(program: Program, tmp_path: Path) -> None:
    tuned = bg.Pipeline([DoRA(r=2, targets=("q",))]).run(program)
    for item in (LoRA(r=1, targets=("q",)), DoRA(r=1, targets=("q",))):
        with pytest.raises(
            PassError, match=r"blocks.0.q.weight has a delta of the family 'dora' already.*merge it first"
        ):
            bg.Pipeline([item]).run(tuned)
    both = bg.Pipeline([LoRA(r=1, targets=("v",))]).run(tuned)
    assert {delta.family.name for delta in deltas_of(both.graph)} == {"lora", "dora"}
    with pytest.raises(InputError, match="of the families lora and dora, and a folder holds one"):
        both.save_delta(str(tmp_path / "d"))


def test_wrong_options_and_files(program: Program, tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"rank_pattern='blocks\.0\.p' fits no site; near it: blocks\.0\.up"):
        bg.Pipeline([LoRA(rank_pattern=(("blocks.0.p", 3),))]).run(program)
    with pytest.raises(InputError, match="option 'bias' of LoRA is 'some'"):
        LoRA(bias="some")  # type: ignore[arg-type]
    stirred(bg.Pipeline([DoRA(r=2)]).run(program)).save_delta(str(tmp_path / "d"))
    (tmp_path / "d" / "manifest.json").unlink()
    config = tmp_path / "d" / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(
        BundleError, match=r"lora_A and lora_B and lora_magnitude of blocks\.0\.q: expected lora_A and"
    ):
        bg.Pipeline([LoadDelta("d")]).run(program, resources={"d": tmp_path / "d"})


def test_biases_of_the_chosen_linears_alone(program: Program) -> None:
    tuned = bg.Pipeline([LoRA(r=2, targets=("q",), bias="lora_only")]).run(program)
    assert tuned.trained_whole == {"blocks.0.q.bias", "blocks.1.q.bias"}
    assert trained(tuned).parameters.keys() == tuned.parameters.keys()
