"""Prune: golden graph, values against naive pruning, and zeros that stay zero in training and in engines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bmgraph as bg
from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.weight_sites import linears, weight_of
from bmgraph.backends import AdamW, Torch
from bmgraph.errors import InputError, OrderError, PassError, VerificationError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.passes import LoRA, Merge, Prune, Quantize
from bmgraph.passes.prune.patterns import sparsity_mask
from bmgraph.passes.prune.scores import FUNCTIONS
from bmgraph.verify.metrics import relative_error
from tests.helpers.deltas import Stored, Tied, replay_in_a_fresh_process, trained
from tests.helpers.engines import has_mul_by_weights, matrices
from tests.helpers.models import TinyEncoder, tiny_encoder, tokens
from tests.helpers.training import captured_to_train, labelled

Batches = list[dict[str, torch.Tensor]]


def most_in_a_group(matrix: Any) -> int:
    """The largest number of nonzeros in any group of four along the inputs of a matrix [inputs, outputs]."""
    values = np.asarray(matrix)
    assert values.shape[0] % 4 == 0
    return int((values.reshape(-1, 4, values.shape[1]) != 0).sum(1).max())


def weights(program: Program) -> dict[str, torch.Tensor]:
    """The effective weight of every linear, as [inputs, outputs]."""
    found = {}
    for node in linears(program.graph):
        weight = weight_of(program, node)
        assert weight is not None
        value = evaluate(program, weight.node)
        found[weight.site] = value if weight.transposed else value.T
    return found


def test_the_rewritten_graph_is_golden() -> None:
    program = bg.capture(nn.Linear(16, 24), {"input": torch.randn(3, 16)})
    assert str(bg.Pipeline([Prune()]).run(program)) == (
        "forward(input: f32[batch, 16]):\n"
        "  %mul = aten.mul.Tensor(weight, weight_mask) : f32[24, 16]  # site=weight part=weight pass=prune\n"
        "  %linear = aten.linear(%input, %mul, bias) : f32[batch, 24]\n"
        "  return output=%linear\n"
    )


def test_numbers_equal_the_naive_form() -> None:
    model = nn.Linear(16, 24)
    x = torch.randn(5, 16)
    pruned = bg.Pipeline([Prune()]).run(bg.capture(model, {"input": x}))
    kept = model.weight.detach().clone()
    for row in kept:
        for start in range(0, 16, 4):
            group = row[start : start + 4]
            group[group.abs().argsort()[:2]] = 0.0
    assert relative_error(pruned(input=x)["output"], x @ kept.T + model.bias.detach()) < 1e-6


def test_groups_of_a_weight_stored_the_other_way_run_along_its_inputs() -> None:
    pruned = bg.Pipeline([Prune()]).run(bg.capture(Stored(), {"x": torch.randn(3, 16)}))
    assert pruned.parameters["w_mask"].shape == (16, 24)
    assert most_in_a_group(pruned.parameters["w_mask"]) == 2


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 6), st.integers(0, 1000), st.booleans())
def test_two_of_four_stay_and_they_hold_half_of_the_squares(
    rows: int, groups: int, seed: int, equal: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 4 * groups, generator=generator)
    weight = torch.sign(weight) if equal else weight
    mask = sparsity_mask(weight.abs(), 2, 4)
    assert bool((mask.reshape(rows, groups, 4).sum(-1) == 2).all())
    least_kept = weight.abs().masked_fill(~mask, torch.inf).reshape(rows, groups, 4).amin(-1)
    most_dropped = weight.abs().masked_fill(mask, 0.0).reshape(rows, groups, 4).amax(-1)
    assert bool((least_kept >= most_dropped).all())
    assert bool(((weight * ~mask).norm(dim=1) <= Prune().measured.bound * weight.norm(dim=1)).all())


def test_roles_stay_and_quantized_codes_of_what_was_pruned_are_zero(
    program: Program, batches: Batches
) -> None:
    pruned = bg.Pipeline([Prune()]).run(program)
    assert pruned.structure().roles == program.structure().roles
    for mode in ("static", "dynamic", "none"):
        small = bg.Pipeline([Quantize("int8", activations=mode)]).run(pruned, calibration=batches)
        assert small.structure().roles == program.structure().roles
        for name, mask in pruned.parameters.items():
            if name.endswith("_mask"):
                site = name.removesuffix("_mask")
                codes = small.parameters[f"{site}_codes"]
                assert not codes[~mask].any()
                assert bool((codes.abs().amax(1) == 127).all())
                assert name not in small.parameters


def test_a_quantized_weight_is_pruned_under_its_codes(program: Program) -> None:
    small = bg.Pipeline([Quantize("int8", activations="none"), Prune()]).run(program)
    assert small.structure().roles == program.structure().roles
    assert all(most_in_a_group(weight) == 2 for weight in weights(small).values())
    assert "blocks.0.q.weight_codes" in small.frozen
    assert "blocks.0.q.weight_mask" in small.frozen


def test_training_moves_what_is_left_alone() -> None:
    pruned = bg.Pipeline([Prune()]).run(bg.capture(tiny_encoder(), tokens()))
    module = pruned.module(training=True)
    optimizer = torch.optim.SGD([item for item in module.parameters() if item.requires_grad], lr=0.1)
    before = weights(pruned)
    for _ in range(3):
        optimizer.zero_grad()
        sum(value.square().mean() for value in module(*tokens().values())).backward()
        optimizer.step()
    after = pruned.clone()
    for name, item in module.named_parameters():
        after.parameters[name] = item.detach()
        if f"{name}_mask" in pruned.parameters:
            assert item.grad is not None
            assert not item.grad[~pruned.parameters[f"{name}_mask"]].any()
    for site, weight in weights(after).items():
        assert most_in_a_group(weight) == 2
        assert not torch.equal(weight, before[site])
        assert torch.equal(weight != 0, before[site] != 0)


def test_a_delta_leaves_the_mask_alone(program: Program) -> None:
    tuned = trained(bg.Pipeline([Prune(), LoRA(r=2)]).run(program))
    assert tuned.structure().roles == program.structure().roles
    assert all(most_in_a_group(weight) == 2 for weight in weights(tuned).values())
    assert {"blocks.0.q.weight_mask", "blocks.0.q.weight"} <= tuned.frozen


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["dynamic", "none"])
def test_the_pattern_lasts_through_training_a_delta_merging_and_int8(activations: str) -> None:
    """From pruning to an engine: the delta trains, merging keeps the zeros, and every group of four has two nonzeros."""
    pytest.importorskip("onnxruntime")
    pruned = bg.Pipeline([Prune()]).run(captured_to_train("llama"))
    trainer = bg.compile(pruned, [LoRA(r=2)], backend=Torch(optimizer=AdamW(lr=1e-2)))
    losses = [trainer.step(labelled("llama", 4, 11, seed=1)).loss for _ in range(6)]
    assert losses[-1] < losses[0]
    tuned = trainer.program()
    with pytest.raises(
        PassError, match="its weight is masked, and a changed weight may fill the pattern's zeros"
    ):
        bg.Pipeline([Merge()]).run(tuned)
    assert all(torch.equal(weight, weights(pruned)[site]) for site, weight in weights(tuned).items())
    engine = bg.compile(tuned, [Quantize("int8", activations=activations)], backend="onnx")
    found = matrices(engine, without="lora")
    assert len(found) == 15
    assert [name for name, matrix in found.items() if most_in_a_group(matrix) > 2] == []
    assert {array.dtype for array in found.values()} == {np.dtype(np.int8)}


@pytest.mark.slow
def test_the_pattern_lasts_through_training_the_weights_themselves() -> None:
    pytest.importorskip("onnxruntime")
    pruned = bg.Pipeline([Prune()]).run(captured_to_train("llama"))
    trainer = bg.compile(pruned, backend=Torch(optimizer=AdamW(lr=1e-2)))
    losses = [trainer.step(labelled("llama", 4, 11, seed=1)).loss for _ in range(6)]
    assert losses[-1] < losses[0]
    found = matrices(bg.compile(trainer.program(), backend="onnx"))
    assert [name for name, matrix in found.items() if most_in_a_group(matrix) > 2] == []


@pytest.mark.parametrize(
    "passes",
    [
        [Prune()],
        pytest.param([Prune(), Quantize("int8", activations="none")], marks=pytest.mark.slow),
        pytest.param([Prune(), Quantize("int8", activations="dynamic")], marks=pytest.mark.slow),
        [Prune(), Quantize("int8", activations="static")],
        [Quantize("int8", activations="dynamic"), Prune()],
        [Prune(), LoRA(r=2), Quantize("int8", activations="static")],
    ],
    ids=lambda passes: "-".join(str(item) for item in passes),
)
def test_every_group_of_the_engine_has_two(program: Program, batches: Batches, passes: list[Pass]) -> None:
    pytest.importorskip("onnxruntime")
    engine = bg.compile(program, passes, backend="onnx", calibration=batches)
    found = matrices(engine, without="lora")
    assert len(found) == 13
    assert [name for name, matrix in found.items() if most_in_a_group(matrix) > 2] == []
    assert not has_mul_by_weights(engine)


@pytest.mark.slow
def test_it_is_replayed_to_equal_bits_in_another_process(
    program: Program, model: TinyEncoder, tmp_path: Path
) -> None:
    bg.Pipeline([Prune(exclude=("head",))]).run(program).save(str(tmp_path / "pruned"))
    replay_in_a_fresh_process(
        tmp_path / "pruned", "from tests.helpers.models import tiny_encoder", "tiny_encoder()"
    )


def test_saved_and_loaded(program: Program, tmp_path: Path) -> None:
    pruned = bg.Pipeline([Prune()]).run(program)
    pruned.save(str(tmp_path / "pruned"))
    loaded = bg.load(tmp_path / "pruned")
    assert str(loaded) == str(pruned)
    assert loaded.frozen == pruned.frozen
    assert torch.equal(loaded(**tokens())["logits"], pruned(**tokens())["logits"])


def test_a_saved_engine_gives_the_same(program: Program, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    engine = bg.compile(program, [Prune()], backend="onnx")
    engine.save(tmp_path / "engine")
    again = bg.load(tmp_path / "engine")
    assert torch.equal(again(**tokens())["logits"], engine(**tokens())["logits"])


def test_a_meta_program_is_pruned_without_weights(program: Program) -> None:
    pruned = bg.Pipeline([Prune()]).run(program.to("meta"))
    assert pruned.parameters["blocks.0.q.weight_mask"].device.type == "meta"


def test_what_does_not_fit_is_declined_with_the_reason() -> None:
    odd = bg.capture(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), {"input": torch.randn(3, 6)})
    record = bg.Pipeline([Prune()]).run(odd).history[-1]
    assert [edit.site for edit in record.edits] == ["1.weight"]
    assert record.declined[0].what == "its 6 inputs are not a multiple of 4"
    tied = bg.capture(Tied(), {"ids": torch.randint(0, 40, (3, 4))})
    record = bg.Pipeline([Prune()]).run(tied).history[-1]
    assert [edit.site for edit in record.edits] == ["mid.weight"]
    assert "something else reads its weight" in record.declined[0].what


def test_no_match_leaves_the_program_alone(program: Program) -> None:
    text = str(program)
    with pytest.raises(PassError, match=r"include='\*\.dwn' fits no site; near it: .*down"):
        bg.Pipeline([Prune(include=("*.dwn",))]).run(program)
    with pytest.raises(PassError, match="changed nothing"):
        bg.Pipeline([Prune(exclude=("*",))]).run(program)
    assert str(program) == text


def test_wrong_options_and_orders_are_refused(program: Program) -> None:
    for pattern in ("4:2", "2:2", "0:4", "2:4:8", "all", "2:128"):
        with pytest.raises(InputError, match=rf"pattern='{pattern}': give N:M"):
            Prune(pattern)
    with pytest.raises(InputError, match=r"score='worth': choose one of magnitude"):
        Prune(score="worth")
    with pytest.raises(OrderError, match="cannot run on a program that is pruned"):
        bg.Pipeline([Prune(), Prune()]).run(program)


def test_a_mask_that_drops_too_much_is_stopped(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FUNCTIONS, "magnitude", lambda weight, squares: -weight.abs())
    with pytest.raises(VerificationError, match=r"channel \d+ of its weight changed|its weight changed"):
        bg.Pipeline([Prune()]).run(program, max_drift=10)


class InOut(nn.Module):
    """A feed-forward whose weights are stored [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (
            nn.Parameter(torch.randn(*sizes) / sizes[0] ** 0.5) for sizes in ((32, 64), (64, 32))
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.tanh(input @ self.up) @ self.down


@pytest.mark.parametrize("symmetric", [True, False])
def test_masks_over_codes_of_weights_that_are_stored_in_out(symmetric: bool) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    passes = [Quantize("int4", group=16, symmetric=symmetric), Prune("2:4")]
    engine = bg.compile(
        InOut().eval(), passes, example={"input": torch.randn(3, 5, 32)}, backend="onnx", max_drift=2.0
    )
    assert [len(record.edits) for record in engine.report.records if not record.within] == [2, 2]
    assert engine.report.engine_drift is not None
    assert engine.report.engine_drift < 1e-5  # to the program, whose weights are masked


@pytest.mark.parametrize(
    "passes",
    [
        (Quantize("int4", group=16), Prune("2:4", score="sparsegpt")),
        (Prune("2:4"), Quantize("int4", method="gptq", group=16)),
    ],
)
def test_what_cannot_follow_offers_to_go_first(passes: tuple[Prune | Quantize, ...]) -> None:
    torch.manual_seed(0)
    batches = [{"input": torch.randn(3, 5, 32)} for _ in range(2)]
    program = bg.capture(InOut().eval(), batches[0])
    found = f"try this order: passes=[{passes[1]}, {passes[0]}]"
    with pytest.raises(OrderError, match=re.escape(found)):
        bg.Pipeline(list(passes)).run(program, calibration=batches)
    bg.Pipeline([passes[1], passes[0]]).run(program, calibration=batches, max_drift=2.0)
