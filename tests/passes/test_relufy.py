"""Relufy: golden graph, every kind of activation, what it declines, its training, and experts that recover behind MoEfy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.errors import InputError, OrderError, PassError, ResourceError, VerificationError
from bmgraph.ir.program import Program
from bmgraph.passes import Distill, LoRA, MoEfy, Quantize, Relufy
from bmgraph.passes.relufy import Relufy as Kind
from bmgraph.verify.metrics import relative_error
from tests.helpers.captured import NAMES, batches, captured
from tests.helpers.deltas import replay_in_a_fresh_process, trained
from tests.helpers.feedforwards import (
    KINDS,
    FeedForward,
    calibration,
    captured_feedforward,
    chosen_ids,
    inputs,
)
from tests.helpers.sweep import sweep
from tests.helpers.zoo import BY_NAME

TRAINER = Torch(optimizer=AdamW(lr=3e-3))


def relufied(program: Program, steps: int = 0, **options: Any) -> Program:
    """The program after Relufy, trained on the calibration batches."""
    resources = {"text": calibration(), "trainer": TRAINER} if steps else {}
    return bg.Pipeline([Relufy(steps=steps, **options)]).run(program, resources=resources)


def test_the_rewritten_graph_is_golden() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    changed = bg.Pipeline([Relufy(steps=0)]).run(bg.capture(model, {"input": torch.randn(5, 4)}))
    assert str(changed) == (
        "forward(input: f32[batch, 4]):\n"
        "  %linear = aten.linear(%input, 0.weight, 0.bias) : f32[batch, 8]\n"
        "  %relu = aten.relu(%linear) : f32[batch, 8]  # site=0.weight pass=relufy{steps=0}\n"
        "  %linear_1 = aten.linear(%relu, 2.weight, 2.bias) : f32[batch, 4]\n"
        "  return output=%linear_1\n"
    )
    assert changed.structure().feedforwards[0].activation == "relu"


@pytest.mark.parametrize(
    ("kind", "activation"), sweep([kind for kind in KINDS if kind[1] != "relu"], [("fused", "silu")])
)
def test_it_equals_the_model_with_relu(kind: str, activation: str) -> None:
    program, x = captured_feedforward(kind, activation), inputs(seed=50)
    torch.manual_seed(0)
    model = FeedForward(kind, "relu").eval()
    found = relufied(program)(x=x)["output"]
    assert relative_error(found, model(x)) < 1e-6
    assert relative_error(found, program(x=x)["output"]) > 1e-3


class Composed(nn.Module):
    """A feed-forward with an activation that is no operator, within another type."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        if self.kind == "quick":
            hidden = hidden * torch.sigmoid(1.702 * hidden)
        elif self.kind == "squared":
            hidden = torch.relu(hidden).square()
        elif self.kind == "double":
            hidden = nn.functional.gelu(hidden.double()).float()
        else:
            hidden = nn.functional.elu(hidden)
        out: torch.Tensor = self.down(hidden)
        return out


@pytest.mark.parametrize("kind", sweep(["quick", "double", "elu"], ["quick"]))
def test_activations_of_several_calls_are_changed(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Composed(kind), inputs(seed=50)
    found = relufied(bg.capture(model, {"x": inputs()}))(x=x)["output"]
    assert relative_error(found, model.down(torch.relu(model.up(x)))) < 1e-6


def test_what_is_zero_below_zero_is_declined() -> None:
    for program in (captured_feedforward("gated", "relu"), bg.capture(Composed("squared"), {"x": inputs()})):
        with pytest.raises(
            PassError, match=r"changed nothing \(up\.weight: its activation .* is zero for neg"
        ):
            relufied(program)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_is_changed_or_says_why_not(name: str) -> None:
    program = captured(name)[1]
    if all(item.activation == "relu" for item in program.structure().feedforwards):
        with pytest.raises(PassError, match="changed nothing"):
            bg.Pipeline([Relufy(steps=0)]).run(program)
        return
    done = bg.Pipeline([Relufy(steps=0)]).run(program)
    assert len(done.history[-1].edits) == BY_NAME[name].expected.feedforwards
    assert {item.activation for item in done.structure().feedforwards} == {"relu"}
    assert done.structure().roles == program.structure().roles
    assert all(output.isfinite().all() for output in done(**batches(BY_NAME[name])[0]).values())


def test_it_trains_as_distill_does_on_the_program_before() -> None:
    program, x = captured_feedforward("gated", "silu"), inputs(seed=50)
    found = relufied(program, 12)
    resources = {"teacher": program, "text": calibration(), "trainer": TRAINER}
    wanted = bg.Pipeline([Distill(steps=12, on="outputs")]).run(relufied(program), resources=resources)
    assert torch.equal(found(x=x)["output"], wanted(x=x)["output"])
    changed, trained_by, whole = found.history
    assert (changed.within, trained_by.within, whole.within) == ("relufy{steps=12}", "relufy{steps=12}", "")
    assert [edit.site for edit in whole.edits] == ["up.weight", "output"]
    assert set(whole.resources) == {"text"}
    before = relative_error(relufied(program)(x=x)["output"], program(x=x)["output"])
    assert relative_error(found(x=x)["output"], program(x=x)["output"]) < 0.7 * before


@pytest.mark.slow
def test_another_teacher_and_values_may_be_named() -> None:
    program = captured_feedforward("plain", "gelu")
    resources = {"large": captured_feedforward("plain", "relu"), "text": calibration(1)}
    done = bg.Pipeline([Relufy(steps=2, on=("cosine",), teacher="large")]).run(program, resources=resources)
    assert done.history[-1].text == "relufy{steps=2,on=[cosine],teacher=large}"
    assert set(done.history[-1].resources) == {"large", "text"}


@pytest.mark.slow
def test_a_model_goes_through_relufy_moefy_and_int8_to_an_engine(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, _ = captured("llama")
    text = [{name: x for name, x in batch.items() if name != "labels"} for batch in batches(BY_NAME["llama"])]
    engine = bg.compile(
        model,
        passes=[
            Relufy(data="text", steps=5),
            MoEfy(experts=8, active=4),
            Quantize("int8", activations="none"),
        ],
        example=text[0],
        backend="onnx",
        calibration=text,
        resources={"text": text},
    )
    engine.save(tmp_path / "engine")
    asked = [record.text for record in bg.load(tmp_path / "engine").report.records if not record.within]
    assert asked[0] == "relufy{steps=5}"
    assert engine(**text[0])["logits"].isfinite().all()


@pytest.mark.slow
def test_it_is_replayed_to_equal_bits(tmp_path: Path) -> None:
    relufied(captured_feedforward("gated", "silu"), 4).save(str(tmp_path / "done"))
    replay_in_a_fresh_process(
        tmp_path / "done",
        "from tests.helpers.feedforwards import *; from tests.passes.test_relufy import TRAINER",
        "captured_feedforward('gated', 'silu')",
        ", resources={'text': calibration(), 'trainer': TRAINER}",
    )


@pytest.mark.slow
def test_experts_recover_with_their_routers_in_place() -> None:
    program, x = captured_feedforward("plain", "relu"), inputs(seed=50)
    parted = bg.Pipeline([MoEfy(8, 2, split="random")]).run(program, calibration=calibration())
    resources = {"teacher": program, "text": calibration(), "trainer": TRAINER}
    done = bg.Pipeline([Distill(steps=40, on="outputs")]).run(parted, resources=resources)
    wanted = program(x=x)["output"]
    before, after = (relative_error(item(x=x)["output"], wanted) for item in (parted, done))
    assert after < 0.85 * before
    assert torch.equal(chosen_ids(done, x), chosen_ids(parted, x))
    moved = {
        name for name, value in done.parameters.items() if not torch.equal(value, parted.parameters[name])
    }
    assert moved == {"up.weight", "up.bias", "down.weight", "down.bias"}


@pytest.mark.slow
def test_deltas_in_front_of_the_activation_stay_in_front_of_it() -> None:
    program = trained(bg.Pipeline([LoRA(r=3, targets=("*",))]).run(captured_feedforward("gated", "silu")))
    x = inputs(seed=50)
    gate = program.tensor("gate.weight") + _delta(program, "gate")
    up = program.tensor("up.weight") + _delta(program, "up")
    down = program.tensor("down.weight") + _delta(program, "down")
    hidden = torch.relu(x @ gate.T) * (x @ up.T + program.tensor("up.bias"))
    assert relative_error(relufied(program)(x=x)["output"], x + hidden @ down.T) < 1e-5


def _delta(program: Program, name: str) -> torch.Tensor:
    """What a LoRA of rank 3 at its default alpha adds to a weight: 2 at the usual 2 r, or what its scale says."""
    a, b = program.tensor(f"{name}.weight_lora_a"), program.tensor(f"{name}.weight_lora_b")
    return b @ a * (LoRA(r=3).alpha / 3)


def test_a_rewrite_beside_the_activation_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    program, change = captured_feedforward("gated", "silu"), Kind._changed

    def wrong(self: Kind, program: Program, context: Any) -> Program:
        done = change(self, program, context)
        (product,) = [node for node in done.graph.nodes if node.target is torch.ops.aten.mul.Tensor]
        product.target = torch.ops.aten.add.Tensor
        return done

    monkeypatch.setattr(Kind, "_changed", wrong)
    with pytest.raises(VerificationError, match=r"was aten\.mul\.Tensor, and is aten\.add\.Tensor"):
        relufied(program)


def test_bad_input_is_refused() -> None:
    program = captured_feedforward("plain", "gelu")
    with pytest.raises(InputError, match="steps=-1: give a number of steps, or 0"):
        Relufy(steps=-1)
    with pytest.raises(InputError, match=r"on=\('likelihood',\): choose one of"):
        Relufy(on="likelihood")  # type: ignore[arg-type]
    with pytest.raises(ResourceError, match="needs the resource 'text', which was not given"):
        bg.Pipeline([Relufy()]).run(program)
    with pytest.raises(ResourceError, match="'text' holds no batch"):
        bg.Pipeline([Relufy(steps=1)]).run(program, resources={"text": []})
    with pytest.raises(PassError, match=r"include='\*\.upp' fits no site; near it: up"):
        relufied(program, include=("*.upp",))
    with pytest.raises(OrderError, match=r"try this order: passes=\[relufy\{steps=0\}, moefy"):
        bg.Pipeline([MoEfy(8, 4), Relufy(steps=0)]).run(program, calibration=calibration())
    with pytest.raises(OrderError, match=r"try this order: passes=\[relufy\{steps=0\}, quantize"):
        bg.Pipeline([Quantize("int8"), Relufy(steps=0)]).run(program, calibration=calibration())
