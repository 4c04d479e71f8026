"""LoRA: golden graph, values against naive LoRA on every form of weight, what it freezes, selects and declines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bmgraph as bg
from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.weight_sites import site_value
from bmgraph.deltas.registry import deltas_of
from bmgraph.errors import InputError, PassError
from bmgraph.ir.program import Program
from bmgraph.passes import LoRA, Quantize
from bmgraph.verify.metrics import relative_error
from tests.analysis.structure.test_structure import WIDTH, Attention
from tests.helpers.captured import captured
from tests.helpers.deltas import Stored, Tied, masked, replay_in_a_fresh_process, trained, weight_change
from tests.helpers.models import TinyEncoder, tokens

EXACT = 1e-5


def fused() -> tuple[nn.Module, Program]:
    """Attention with one linear for q [16], k [8] and v [8]."""
    model = Attention(fused=True, kv=2)
    return model, bg.capture(model, (torch.randn(2, 6, WIDTH),))


def test_the_rewritten_graph_is_golden() -> None:
    program = bg.capture(nn.Linear(16, 24), {"input": torch.randn(3, 16)})
    tuned = bg.Pipeline([LoRA(r=2, alpha=4, targets=("*",), dropout=0.1)]).run(program)
    stamp = "  # site=weight part=delta pass=lora{r=2,alpha=4,targets=[*],dropout=0.1}"
    assert str(tuned) == (
        "forward(input: f32[batch, 16]):\n"
        "  %linear = aten.linear(%input, weight, bias) : f32[batch, 24]\n"
        f"  %dropout = aten.dropout(%input, 0.1, True) : f32[batch, 16]{stamp}\n"
        f"  %linear_1 = aten.linear(%dropout, weight_lora_a) : f32[batch, 2]{stamp}\n"
        f"  %linear_2 = aten.linear(%linear_1, weight_lora_b) : f32[batch, 24]{stamp}\n"
        f"  %mul = aten.mul.Tensor(%linear_2, 2.0) : f32[batch, 24]{stamp}\n"
        f"  %add = aten.add.Tensor(%linear, %mul) : f32[batch, 24]{stamp}\n"
        "  return output=%add\n"
    )


def test_a_delta_on_a_part_of_a_fused_linear_is_golden() -> None:
    tuned = bg.Pipeline([LoRA(r=2, roles=("attention.v",))]).run(fused()[1])
    stamp = "  # site=all.weight part=delta pass=lora{r=2,roles=[attention.v]}"
    assert "\n".join(line for line in str(tuned).splitlines() if "part=delta" in line) == (
        f"  %mul = aten.mul.Tensor(all.weight_v_lora_b, all.weight_v_lora_rows) : f32[32, 2]{stamp}\n"
        f"  %linear_1 = aten.linear(%x, all.weight_v_lora_a) : f32[batch, sequence, 2]{stamp}\n"
        f"  %linear_2 = aten.linear(%linear_1, %mul) : f32[batch, sequence, 32]{stamp}\n"
        f"  %mul_1 = aten.mul.Tensor(%linear_2, 8.0) : f32[batch, sequence, 32]{stamp}\n"
        f"  %add = aten.add.Tensor(%linear, %mul_1) : f32[batch, sequence, 32]{stamp}"
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.floats(0.1, 64), st.integers(0, 2**31))
def test_a_fresh_one_changes_nothing_and_a_trained_one_is_naive(r: int, alpha: float, seed: int) -> None:
    x = torch.randn(5, 16)
    program = bg.capture(nn.Linear(16, 24), {"input": x})
    fresh = bg.Pipeline([LoRA(r=r, alpha=alpha, targets=("*",), seed=seed)]).run(program)
    assert torch.equal(fresh(input=x)["output"], program(input=x)["output"])
    tuned = trained(fresh)
    a, b = tuned.parameters["weight_lora_a"], tuned.parameters["weight_lora_b"]
    weight = program.parameters["weight"] + alpha / r * (b @ a)
    expected = nn.functional.linear(x, weight, program.parameters["bias"])
    assert relative_error(tuned(input=x)["output"], expected) < EXACT


@pytest.mark.parametrize("form", ["stored", "masked", "int8", "int8 dynamic"])
def test_any_expression_of_a_weight_takes_a_delta(form: str) -> None:
    x = torch.randn(5, 16)
    program = bg.capture(
        Stored() if form == "stored" else nn.Linear(16, 24), {"x" if form == "stored" else "input": x}
    )
    if form == "masked":
        program = masked(program, "weight", torch.rand(24, 16) > 0.5)
    if form.startswith("int8"):
        mode = "dynamic" if form.endswith("dynamic") else "none"
        program = bg.Pipeline([Quantize("int8", activations=mode)]).run(program)
    fresh = bg.Pipeline([LoRA(r=3, targets=("*",))]).run(program)
    tuned = trained(fresh)
    (delta,) = deltas_of(tuned.graph)
    (name,) = (spec.name for spec in program.inputs)
    expected = program(**{name: x})["output"] + nn.functional.linear(x, weight_change(tuned, delta))
    assert relative_error(tuned(**{name: x})["output"], expected) < EXACT
    assert tuned.structure().roles == program.structure().roles


def test_a_role_within_a_fused_linear_changes_its_outputs_alone() -> None:
    model, program = fused()
    tuned = trained(bg.Pipeline([LoRA(r=2, roles=("attention.q", "attention.v"))]).run(program))
    second, first = deltas_of(tuned.graph)
    weight = program.parameters["all.weight"]
    moved = weight + weight_change(tuned, first) + weight_change(tuned, second)
    rows = ((moved - weight) != 0).any(1)
    assert rows.tolist() == [True] * 16 + [False] * 8 + [True] * 8
    with torch.no_grad():
        x = torch.randn(3, 7, WIDTH)
        found = tuned(x=x)["output"]
        model.all.weight.copy_(moved)  # type: ignore[union-attr, operator]
        assert relative_error(found, model(x)) < EXACT


def test_the_parts_of_heads_that_interleave() -> None:
    """Every third block of the outputs is queries."""
    _, program = captured("bloom")
    tuned = trained(bg.Pipeline([LoRA(r=2, roles=("attention.q",))]).run(program))
    part = program.structure().attentions[0].q
    assert part is not None
    assert len(part.runs) > 1
    delta = next(item for item in deltas_of(tuned.graph) if item.site == part.linear)
    rows = evaluate(tuned, delta.tensors["b"]).ne(0).any(1).nonzero().flatten().tolist()
    assert rows == [row for start, stop in part.runs for row in range(start, stop)]


def test_everything_else_is_frozen_and_the_delta_learns(program: Program) -> None:
    tuned = bg.Pipeline([LoRA(r=4)]).run(program)
    free = set(tuned.parameters) - tuned.frozen
    sites = [f"blocks.{layer}.{letter}.weight" for layer in (0, 1) for letter in "qv"]
    assert free == {f"{site}_lora_{letter}" for site in sites for letter in "ab"}
    module = tuned.module(training=True)
    sum(value.sum() for value in module(*tokens().values())).backward()  # type: ignore[union-attr]
    moved = {
        name for name, item in module.named_parameters() if item.grad is not None and bool(item.grad.any())
    }
    assert moved == {name for name in free if name.endswith("_b")}  # B is zero, so the gradient of A is zero


def test_dropout_is_of_the_training_form_alone() -> None:
    x = torch.ones(40, 16)
    program = bg.capture(nn.Linear(16, 24), {"input": x})
    tuned = trained(bg.Pipeline([LoRA(targets=("*",), dropout=0.5)]).run(program))
    assert torch.equal(tuned(input=x)["output"][0], tuned(input=x)["output"][1])
    (noisy,) = tuned.module(training=True)(x)
    assert not torch.equal(noisy[0], noisy[1])


def test_roles_stay_and_its_parameters_belong_to_their_sites(program: Program) -> None:
    tuned = bg.Pipeline([LoRA(roles=("*",))]).run(program)
    before, after = program.structure(), tuned.structure()
    assert after.roles == before.roles
    assert (after.attentions, after.feedforwards, after.stacks) == (
        before.attentions,
        before.feedforwards,
        before.stacks,
    )
    assert after.role("blocks.0.q.weight_lora_a") == "attention.q"
    assert len(tuned.history[-1].edits) == len(before.linears)


def test_later_passes_leave_the_delta_alone(program: Program) -> None:
    tuned = bg.Pipeline([LoRA(r=16, roles=("*",)), Quantize("int8", activations="dynamic")]).run(program)
    names = {name for name in tuned.parameters if "_lora_" in name}
    assert all(tuned.parameters[name].is_floating_point() for name in names)
    assert not any(name.endswith(("_codes", "_scale")) for name in names)
    assert set(tuned.parameters) - tuned.frozen == names


def test_a_second_one_stacks_and_both_train(program: Program) -> None:
    once = bg.Pipeline([LoRA(r=2)]).run(program)
    twice = bg.Pipeline([LoRA(r=3, alpha=6, roles=("attention.q", "feedforward.*"))]).run(trained(once))
    batch = tokens(2, 5, 3)
    assert torch.equal(twice(**batch)["logits"], trained(once)(**batch)["logits"])
    assert len(set(twice.parameters) - twice.frozen) == 2 * (4 + 6)
    tuned = trained(twice, seed=1)
    by_hand = program.clone()
    for delta in deltas_of(tuned.graph):
        by_hand.parameters[delta.site] = by_hand.parameters[delta.site] + weight_change(tuned, delta)
    assert relative_error(tuned(**batch)["logits"], by_hand(**batch)["logits"]) < EXACT
    assert twice.structure().roles == program.structure().roles


def test_every_use_of_a_shared_linear_has_the_delta() -> None:
    _, program = captured("albert")
    tuned = trained(bg.Pipeline([LoRA(r=2)]).run(program))
    found = deltas_of(tuned.graph)
    assert len(found) == 4
    assert len({delta.tensors["a"] for delta in found}) == 2
    by_hand = program.clone()
    for delta in found[:2]:
        by_hand.parameters[delta.site] = by_hand.parameters[delta.site] + weight_change(tuned, delta)
    for key, value in by_hand(**program.example).items():
        assert relative_error(tuned(**program.example)[key], value) < EXACT


def test_a_tied_head_is_found_under_its_own_name_and_the_embedding_is_left() -> None:
    program = bg.capture(Tied(), {"ids": torch.randint(0, 40, (3, 4))})
    tuned = trained(bg.Pipeline([LoRA(r=2, targets=("head",))]).run(program))
    (delta,) = deltas_of(tuned.graph)
    assert delta.site == "embed.weight"
    ids = torch.randint(0, 40, (2, 5))
    weight = program.parameters["embed.weight"]
    mid = nn.functional.linear(weight[ids], program.parameters["mid.weight"], program.parameters["mid.bias"])
    assert relative_error(tuned(ids=ids)["output"], mid @ (weight + weight_change(tuned, delta)).T) < EXACT


def test_experts_and_embeddings_are_declined() -> None:
    _, program = captured("mixtral")
    record = bg.Pipeline([LoRA(roles=("attention.q", "experts.*", "embedding"))]).run(program).history[-1]
    assert len(record.edits) == 2
    reasons = {edit.site.rpartition(".")[2]: edit.what for edit in record.declined}
    assert "it is a stack of experts" in reasons["down_proj"]
    assert "looked up" in reasons["weight"]
    with pytest.raises(PassError, match=r"changed nothing.*a stack of experts"):
        bg.Pipeline([LoRA(targets=("*.experts.*",))]).run(program)


def test_routers_that_only_choose_are_declined() -> None:
    from tests.helpers.feedforwards import captured_feedforward, moefied

    program = moefied(captured_feedforward(), router="random")
    for item in (LoRA(targets=("*",)), LoRA(roles=("*",))):
        with pytest.raises(PassError, match=r"changed nothing.*no gradient would reach its delta"):
            bg.Pipeline([item]).run(program)


def test_a_router_whose_scores_weight_its_experts_takes_a_delta() -> None:
    _, program = captured("mixtral")
    record = bg.Pipeline([LoRA(targets=("*.mlp.gate.*",))]).run(program).history[-1]
    assert len(record.edits) == 2


def test_wrong_options_are_refused(program: Program) -> None:
    with pytest.raises(PassError, match=r"targets='\*\.quer' fits no site; near it: .*\.q"):
        bg.Pipeline([LoRA(targets=("*.quer",))]).run(program)
    with pytest.raises(PassError, match=r"roles='attention\.query' fits no role; near it: attention\.q"):
        bg.Pipeline([LoRA(roles=("attention.query",))]).run(program)
    with pytest.raises(InputError, match="r=0"):
        LoRA(r=0)
    with pytest.raises(InputError, match="alpha=-1"):
        LoRA(alpha=-1)
    with pytest.raises(InputError, match="dropout=1"):
        LoRA(dropout=1)
    with pytest.raises(InputError, match="not both"):
        LoRA(targets=("*.q",), roles=("attention.q",))


def test_ends_of_paths_and_modules_that_hold_linears_are_targets(program: Program) -> None:
    for targets, sites in (
        ("q", {"blocks.0.q", "blocks.1.q"}),
        (["blocks.1"], {f"blocks.1.{name}" for name in ("q", "k", "v", "o", "up", "down")}),
        (("head",), {"head"}),
        (("0.u*", "1.q"), {"blocks.0.up", "blocks.1.q"}),
    ):
        record = bg.Pipeline([LoRA(targets=targets)]).run(program).history[-1]  # type: ignore[arg-type]
        assert {edit.site for edit in record.edits} == {f"{site}.weight" for site in sites}


def test_no_match_leaves_the_program_alone(program: Program) -> None:
    text = str(program)
    with pytest.raises(PassError):
        bg.Pipeline([LoRA(targets=("nowhere.*",))]).run(program)
    assert str(program) == text
    assert not program.frozen


def test_a_is_drawn_for_each_site_by_itself(program: Program) -> None:
    some = bg.Pipeline([LoRA(roles=("attention.v",))]).run(program)
    more = bg.Pipeline([LoRA(roles=("*",))]).run(program)
    other = bg.Pipeline([LoRA(roles=("*",), seed=1)]).run(program)
    name = "blocks.1.v.weight_lora_a"
    assert torch.equal(some.parameters[name], more.parameters[name])
    assert not torch.equal(some.parameters[name], other.parameters[name])
    assert float(some.parameters[name].abs().max()) <= 32**-0.5
    assert not torch.equal(more.parameters[name], more.parameters["blocks.0.v.weight_lora_a"])


def test_it_is_replayed_to_equal_bits_in_another_process(
    program: Program, model: TinyEncoder, tmp_path: Path
) -> None:
    bg.Pipeline([LoRA(r=3, dropout=0.1, seed=5)]).run(program).save(str(tmp_path / "tuned"))
    replay_in_a_fresh_process(
        tmp_path / "tuned", "from tests.helpers.models import tiny_encoder", "tiny_encoder()"
    )


def test_saved_and_loaded(program: Program, tmp_path: Path) -> None:
    tuned = trained(bg.Pipeline([LoRA(r=3, dropout=0.1)]).run(program))
    tuned.save(str(tmp_path / "tuned"))
    loaded = bg.load(tmp_path / "tuned")
    assert str(loaded) == str(tuned)
    assert loaded.frozen == tuned.frozen
    assert [delta.site for delta in deltas_of(loaded.graph)] == [
        delta.site for delta in deltas_of(tuned.graph)
    ]
    assert torch.equal(loaded(**tokens())["logits"], tuned(**tokens())["logits"])
    assert site_value(loaded, "blocks.0.q.weight").equal(program.parameters["blocks.0.q.weight"])


def test_a_meta_program_takes_deltas_without_weights(program: Program) -> None:
    tuned = bg.Pipeline([LoRA(r=3)]).run(program.to("meta"))
    assert tuned.parameters["blocks.0.q.weight_lora_a"].device.type == "meta"


@pytest.mark.parametrize("activations", [None, "none", "dynamic"])
def test_the_onnx_engine_has_the_unmerged_delta(
    program: Program, activations: str | None, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    if activations:
        program = bg.Pipeline([Quantize("int8", activations=activations)]).run(program)
    tuned = trained(bg.Pipeline([LoRA(r=4, roles=("attention.*",))]).run(program), size=0.05)
    engine = bg.compile(tuned, backend="onnx")
    engine.save(tmp_path / "engine")
    batch = tokens(4, 9, 6)
    expected = tuned(**batch)["logits"]
    for found in (engine, bg.load(tmp_path / "engine")):
        assert relative_error(found(**batch)["logits"], expected) < (
            0.06 if activations == "dynamic" else 1e-3
        )
