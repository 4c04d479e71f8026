"""MoEfy: golden graph, values against the naive sum over experts, when it is exact, what it declines and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import InputError, OrderError, PassError, ResourceError
from bmgraph.ir.program import Program
from bmgraph.passes import IA3, LoRA, Merge, MoEfy, Quantize
from bmgraph.verify.metrics import relative_error
from tests.helpers.deltas import masked, replay_in_a_fresh_process, trained
from tests.helpers.feedforwards import (
    KINDS,
    calibration,
    captured_feedforward,
    chosen_ids,
    inputs,
    moefied,
    naive_sum,
)
from tests.helpers.models import TinyEncoder, tokens

EXACT = 1e-5


def test_the_rewritten_graph_is_golden() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(40, 4)
    item = MoEfy(experts=4, active=2)
    parted = bg.Pipeline([item]).run(bg.capture(model, {"input": x}), calibration=[{"input": x}])
    made, routed = (
        "pass=moefy{experts=4,active=2}",
        "site=0.weight part=router pass=moefy{experts=4,active=2}",
    )
    assert str(parted) == (
        "forward(input: f32[batch, 4]):\n"
        f"  %linear = aten.linear(%input, 0.weight_router_hidden, 0.weight_router_hidden_bias) : f32[batch, 16]  # {routed}\n"
        f"  %relu = aten.relu(%linear) : f32[batch, 16]  # {routed}\n"
        f"  %linear_1 = aten.linear(%relu, 0.weight_router, 0.weight_router_bias) : f32[batch, 4]  # {routed}\n"
        f"  %topk = aten.topk(%linear_1, 2)  # {routed}\n"
        f"  %getitem = operator.getitem(%topk, 1) : i64[batch, 2]  # {routed}\n"
        f"  %experts_linear = bmgraph.experts_linear(%input, 0.weight, %getitem, 0.bias) : f32[batch, 2, 2]"
        f"  # site=0.weight part=neurons {made}\n"
        f"  %relu_1 = aten.relu(%experts_linear) : f32[batch, 2, 2]  # {made}\n"
        f"  %experts_linear_1 = bmgraph.experts_linear(%relu_1, 2.weight, %getitem, None) : f32[batch, 2, 4]"
        f"  # site=2.weight part=neurons {made}\n"
        f"  %sum = aten.sum.dim_IntList(%experts_linear_1, [-2]) : f32[batch, 4]  # site=2.weight part=neurons {made}\n"
        f"  %add = aten.add.Tensor(%sum, 2.bias) : f32[batch, 4]  # site=2.weight part=neurons {made}\n"
        "  return output=%add\n"
    )


def test_scales_of_neurons_are_no_sum_that_experts_take() -> None:
    x = torch.randn(40, 4)
    program = bg.capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), {"input": x})
    scaled = bg.Pipeline([IA3(targets=("2",))]).run(program)
    item = MoEfy(experts=4, active=2)
    with pytest.raises(PassError, match=r"the delta on 2\.weight does not add to its output.*: merge it"):
        bg.Pipeline([item]).run(scaled, calibration=[{"input": x}])
    with pytest.raises(OrderError, match=r"try this order: passes=\[moefy{experts=4,active=2}, ia3"):
        bg.Pipeline([IA3(targets=("2",)), item]).run(program, calibration=[{"input": x}])


@pytest.mark.parametrize(("kind", "activation"), KINDS)
def test_it_equals_the_naive_sum_over_the_experts_chosen(kind: str, activation: str) -> None:
    parted = moefied(captured_feedforward(kind, activation))
    x = inputs(seed=50)
    ids = chosen_ids(parted, x)
    assert ids.shape == (36, 2)
    assert len(ids.unique()) > 2
    assert relative_error(parted(x=x)["output"], naive_sum(parted, x, ids, kind, activation)) < 1e-6


@pytest.mark.parametrize("mode", [None, "none", "static", "dynamic"])
@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        kind if kind[0] in ("stored", "fused") else pytest.param(*kind, marks=pytest.mark.slow)
        for kind in KINDS
    ],
)
def test_with_all_experts_nothing_changes(kind: str, activation: str, mode: str | None) -> None:
    """Also for int8 programs: codes and scales move, without new rounding. Where activations are quantized, the last bit of
    a sum may cross a rounding step."""
    program = captured_feedforward(kind, activation)
    if mode is not None:
        program = bg.Pipeline([Quantize("int8", activations=mode)]).run(program, calibration=calibration())
    for router in ("random", "oracle"):
        parted = moefied(program, 8, 8, router=router)
        error = relative_error(parted(x=inputs(seed=50))["output"], program(x=inputs(seed=50))["output"])
        assert error < (EXACT if mode in (None, "none") else 1e-3)
        assert parted.structure().roles.items() >= program.structure().roles.items()


def test_codes_are_moved_and_keep_their_scales() -> None:
    program = bg.Pipeline([Quantize("int8", activations="none")]).run(captured_feedforward("gated", "silu"))
    parted = moefied(program)
    for name in ("gate.weight", "up.weight"):
        old, new = program.parameters[f"{name}_codes"], parted.parameters[f"{name}_codes"]
        rows = new.reshape(-1, new.shape[-1])
        order = torch.tensor([int((old == row).all(1).nonzero()[0]) for row in rows])
        assert torch.equal(old[order], rows)
        scales = parted.parameters[f"{name}_scale"]
        assert torch.equal(program.parameters[f"{name}_scale"][order], scales.flatten())
    assert parted.parameters["down.weight_codes"].dtype == torch.int8
    assert {name for name in parted.parameters if name.endswith("_codes")} <= parted.frozen


def test_a_mask_stays_on_its_entries() -> None:
    program = masked(captured_feedforward(), "up.weight", torch.rand(64, 32) > 0.5)
    parted = moefied(program, 8, 8)
    assert relative_error(parted(x=inputs())["output"], program(x=inputs())["output"]) < EXACT
    assert parted.parameters["up.weight_mask"].shape == (8, 8, 32)


def test_neurons_that_do_not_divide_are_filled_up_with_zeros() -> None:
    program = captured_feedforward("gated", "silu", neurons=61)
    parted = moefied(program, 8, 8)
    assert parted.parameters["down.weight"].shape == (8, 32, 8)
    assert relative_error(parted(x=inputs())["output"], program(x=inputs())["output"]) < EXACT


def test_a_layer_used_twice_has_one_router_for_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                x = x + self.down(torch.relu(self.up(x)))
            return x

    program = bg.capture(Twice(), {"x": inputs()})
    parted = moefied(program, 8, 8)
    assert relative_error(parted(x=inputs())["output"], program(x=inputs())["output"]) < EXACT
    (group,) = parted.structure().experts
    assert len(group.uses) == 2
    assert len(parted.history[-1].edits) == 1


def test_roles_and_parts_are_found_after_it(program: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    parted = bg.Pipeline([MoEfy(8, 4)]).run(program, calibration=batches)
    before, after = program.structure(), parted.structure()
    assert {name: after.role(name) for name in before.roles} == before.roles
    assert [after.role(name) for name in before.members] == [before.role(name) for name in before.members]
    assert [(item.count, item.split, item.activation) for item in after.experts] == [(8, True, "gelu")] * 2
    assert after.role("blocks.0.up.weight_router") == "router"
    assert len(after.layers) == len(before.layers)
    assert parted.history[-1].before is not None
    assert parted.history[-1].after is not None
    assert parted.history[-1].after.flops < parted.history[-1].before.flops


def test_the_oracle_is_best_and_a_trained_router_is_near_it() -> None:
    program = captured_feedforward("plain", "relu")
    drifts = [moefied(program, router=router).history[-1].drift for router in ("oracle", "trained", "random")]
    assert drifts[0] is not None
    assert drifts[1] is not None
    assert drifts[2] is not None
    assert drifts[0] <= drifts[1] < 0.8 * drifts[2]


def test_int8_after_it_rounds_experts_and_no_router() -> None:
    parted = moefied(captured_feedforward("gated", "silu"))
    small = bg.Pipeline([Quantize("int8", activations="none")]).run(parted)
    assert small.parameters["up.weight_codes"].shape == (8, 8, 32)
    assert small.parameters["up.weight_scale"].shape == (8, 8)
    assert {edit.site for edit in small.history[-1].edits} == {"gate.weight", "up.weight", "down.weight"}
    assert {edit.what for edit in small.history[-1].declined} == {
        "it is a router: rounding its weight would change which experts it selects"
    }
    weight = parted.parameters["up.weight"]
    scale = weight.abs().amax(2, keepdim=True) / 127
    near = small.parameters["up.weight_codes"] * small.parameters["up.weight_scale"][:, :, None]
    assert torch.allclose(near, torch.round(weight / scale) * scale)
    assert small.structure().roles == parted.structure().roles


def test_moefied_layers_train_except_the_router() -> None:
    parted = moefied(captured_feedforward("gated", "silu"))
    module = parted.module(training=True)
    module(inputs())[0].square().sum().backward()
    trained = {name for name, item in module.named_parameters() if item.grad is not None}
    assert trained == {"up.weight", "up.bias", "gate.weight", "down.weight"}
    assert parted.frozen == {name for name in parted.parameters if "router" in name}


@pytest.mark.slow
def test_it_is_replayed_to_equal_bits_and_saved(tmp_path: Path) -> None:
    parted = moefied(captured_feedforward("gated", "silu"))
    parted.save(str(tmp_path / "parted"))
    loaded = bg.load(tmp_path / "parted")
    assert str(loaded) == str(parted)
    assert torch.equal(loaded(x=inputs())["output"], parted(x=inputs())["output"])
    replay_in_a_fresh_process(
        tmp_path / "parted",
        "from tests.helpers.feedforwards import *",
        "captured_feedforward('gated', 'silu')",
        ", calibration=calibration()",
    )


def tuned(kind: str, activation: str, **options: int) -> Program:
    """A feed-forward with nonzero deltas on all its linears."""
    return trained(
        bg.Pipeline([LoRA(r=3, targets=("*",))]).run(captured_feedforward(kind, activation, **options))
    )


@pytest.mark.parametrize("router", ["random", "oracle"])
@pytest.mark.parametrize(("kind", "activation"), KINDS)
def test_deltas_on_its_linears_go_on_to_work(kind: str, activation: str, router: str) -> None:
    program, x = tuned(kind, activation, neurons=61), inputs(seed=50)
    parted = moefied(program, 8, 8, router=router)
    assert relative_error(parted(x=x)["output"], program(x=x)["output"]) < EXACT
    assert {name for name in parted.parameters if "lora" in name} == parted.parameters.keys() - parted.frozen


def test_deltas_beside_chosen_experts_equal_those_of_the_chosen_neurons() -> None:
    program, x = tuned("plain", "relu"), inputs(seed=50)
    parted = moefied(program, 8, 2)
    rows = parted.parameters["up.weight"].reshape(-1, x.shape[-1])
    order = [int((program.parameters["up.weight"] == row).all(1).nonzero()[0]) for row in rows]
    groups = torch.tensor(order).reshape(8, -1)
    kept = (
        torch.zeros(36, 64)
        .scatter(1, groups[chosen_ids(parted, x)].flatten(1), 1.0)
        .reshape(*x.shape[:2], 64)
    )
    whole = bg.Pipeline([Merge()]).run(program).parameters
    hidden = torch.relu(x @ whole["up.weight"].T + whole["up.bias"]) * kept
    expected = x + hidden @ whole["down.weight"].T + whole["down.bias"]
    assert relative_error(parted(x=x)["output"], expected) < EXACT


def test_deltas_on_experts_are_neither_merged_nor_saved_as_plain_lora(tmp_path: Path) -> None:
    parted = moefied(tuned("gated", "silu"))
    with pytest.raises(PassError, match="its delta is for experts that each token chooses"):
        bg.Pipeline([Merge()]).run(parted)
    with pytest.raises(InputError, match="PEFT's format supports none for experts that each token chooses"):
        parted.save_delta(str(tmp_path / "delta"))
    assert not (tmp_path / "delta").exists()


def test_feed_forwards_that_cannot_be_split_are_declined_with_the_reason() -> None:
    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            hidden = torch.relu(self.up(x))
            return hidden, self.down(hidden)

    with pytest.raises(PassError, match=r"changed nothing \(up.weight: .* reads its neurons too"):
        moefied(bg.capture(Shown(), {"x": inputs()}))


def test_nothing_to_split_is_refused() -> None:
    with pytest.raises(PassError, match="changed nothing: no site of the program fits it"):
        bg.Pipeline([MoEfy(router="oracle")]).run(bg.capture(nn.LayerNorm(32), (inputs(),)))
    with pytest.raises(PassError, match=r"include='\*\.upp' fits no site; near it: up"):
        moefied(captured_feedforward(), include=("*.upp",))  # type: ignore[arg-type]


def test_bad_input_is_refused(program: Program, batches: list[dict[str, torch.Tensor]]) -> None:
    with pytest.raises(
        PassError,
        match=r"experts=128, but the feed-forward of blocks.0.up.weight has 64 neurons: give at most 64",
    ):
        bg.Pipeline([MoEfy(128, 4)]).run(program, calibration=batches)
    with pytest.raises(ResourceError, match="calibration=batches"):
        bg.Pipeline([MoEfy(8, 4)]).run(program)
    with pytest.raises(PassError, match="a router needs at least 20 calibration tokens, not 8"):
        bg.Pipeline([MoEfy(8, 4)]).run(program, calibration=[tokens(1, 8)])
    with pytest.raises(OrderError, match="cannot run on a program that is moefied"):
        bg.Pipeline([MoEfy(8, 4), MoEfy(4, 2)]).run(program, calibration=batches)
    with pytest.raises(PassError, match="meta device"):
        bg.Pipeline([MoEfy(8, 4)]).run(program.to("meta"), calibration=batches)
    for options, message in (
        ({"experts": 1}, "experts=1: give at least 2"),
        ({"active": 17}, "active=17: give 1 to 16"),
        ({"router": "best"}, "choose one of trained, similarity, oracle, random"),
        ({"tokens": 3}, "tokens=3: give at least 20"),
    ):
        with pytest.raises(InputError, match=message):
            MoEfy(**options)  # type: ignore[arg-type]


def test_the_given_program_is_left_alone(
    model: TinyEncoder, program: Program, batches: list[dict[str, torch.Tensor]]
) -> None:
    text, weight = str(program), program.parameters["blocks.0.up.weight"]
    bg.Pipeline([MoEfy(8, 4)]).run(program, calibration=batches)
    assert str(program) == text
    assert program.parameters["blocks.0.up.weight"] is weight
    assert torch.equal(weight, model.blocks[0].up.weight)
