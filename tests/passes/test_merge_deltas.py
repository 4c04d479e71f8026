"""Merge: folding a delta undoes attaching it, tied weights are untied first, and inexact merges are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bmgraph as bg
from bmgraph.deltas.registry import deltas_of
from bmgraph.errors import OrderError, PassError
from bmgraph.ir.program import Program
from bmgraph.passes import LoRA, Merge, Prune, Quantize
from bmgraph.verify.metrics import relative_error
from tests.helpers.captured import captured
from tests.helpers.deltas import Stored, Tied, replay_in_a_fresh_process, trained
from tests.helpers.models import tokens
from tests.passes.test_lora import EXACT, fused


def merged(program: Program, *lora: LoRA) -> tuple[Program, Program]:
    """A program with trained deltas, and the same program with the deltas merged."""
    tuned = trained(bg.Pipeline(list(lora)).run(program))
    return tuned, bg.Pipeline([Merge()]).run(tuned)


def test_the_merged_graph_is_golden() -> None:
    program = bg.capture(nn.Linear(16, 24), {"input": torch.randn(3, 16)})
    tuned, plain = merged(program, LoRA(r=2, targets=("*",), dropout=0.1))
    assert str(plain) == str(program)
    expected = (
        program.parameters["weight"]
        + 8 * tuned.parameters["weight_lora_b"] @ tuned.parameters["weight_lora_a"]
    )
    assert relative_error(plain.parameters["weight"], expected) < 1e-6
    assert torch.equal(plain.parameters["bias"], program.parameters["bias"])


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.booleans(), st.integers(0, 2**31))
def test_merging_a_fresh_one_gives_the_same_bits(r: int, stored: bool, seed: int) -> None:
    program = bg.capture(Stored() if stored else nn.Linear(16, 24), (torch.randn(3, 16),))
    done = bg.Pipeline([LoRA(r=r, targets=("*",), seed=seed), Merge()]).run(program)
    assert str(done) == str(program)
    assert all(torch.equal(done.parameters[name], tensor) for name, tensor in program.parameters.items())


def test_outputs_and_roles_stay(program: Program) -> None:
    tuned, plain = merged(program, LoRA(r=2, roles=("*",)), LoRA(r=3, roles=("feedforward.*",)))
    assert not deltas_of(plain.graph)
    assert str(plain) == str(program)
    assert plain.structure().roles == program.structure().roles
    batch = tokens(4, 6, 2)
    assert relative_error(plain(**batch)["logits"], tuned(**batch)["logits"]) < EXACT
    assert plain.history[-1].drift is not None
    assert plain.history[-1].drift < EXACT


@pytest.mark.parametrize("name", ["gpt2", "albert"])
def test_stored_the_other_way_fused_and_used_twice(name: str) -> None:
    _, program = captured(name)
    tuned, plain = merged(program, LoRA(r=2, roles=("attention.q", "attention.o")))
    assert str(plain) == str(program)
    for key, value in tuned(**program.example).items():
        assert relative_error(plain(**program.example)[key], value) < EXACT


def test_a_range_of_a_fused_linear_is_merged_into_its_rows_alone() -> None:
    program = fused()[1]
    _, plain = merged(program, LoRA(r=2, roles=("attention.k",)))
    moved = (plain.parameters["all.weight"] != program.parameters["all.weight"]).any(1)
    assert moved.tolist() == [False] * 16 + [True] * 8 + [False] * 8


def test_a_tied_weight_is_untied_so_that_its_other_use_stays() -> None:
    program = bg.capture(Tied(), {"ids": torch.randint(0, 40, (3, 4))})
    tuned, plain = merged(program, LoRA(r=2, targets=("head",)))
    assert torch.equal(plain.parameters["embed.weight"], program.parameters["embed.weight"])
    assert not torch.equal(plain.parameters["head.weight"], program.parameters["embed.weight"])
    assert plain.ties == {}
    assert "a separate weight, head.weight" in plain.history[-1].edits[0].what
    ids = torch.randint(0, 40, (2, 5))
    assert relative_error(plain(ids=ids)["output"], tuned(ids=ids)["output"]) < EXACT


def test_one_of_two_uses_with_a_delta_gets_a_weight_of_its_own() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(torch.relu(self.inner(x)))

    x = torch.randn(3, 8)
    program = trained(bg.Pipeline([LoRA(r=2, targets=("*",))]).run(bg.capture(Twice(), {"x": x})))
    one = program.clone()
    with one.edit() as editor:
        first, _ = deltas_of(editor.graph)
        first.total.replace_all_uses_with(first.linear)
    plain = bg.Pipeline([Merge()]).run(one)
    assert set(plain.parameters) == {"inner.weight", "inner.weight_merged", "inner.bias"}
    assert relative_error(plain(x=x)["output"], one(x=x)["output"]) < EXACT
    assert torch.equal(plain.parameters["inner.weight"], program.parameters["inner.weight"])


def test_half_precision_is_added_in_full() -> None:
    program = bg.capture(nn.Linear(16, 24).bfloat16(), {"input": torch.randn(3, 16, dtype=torch.bfloat16)})
    tuned = bg.Pipeline([LoRA(r=2, targets=("*",))]).run(program)
    tuned.parameters["weight_lora_b"] = torch.randn(24, 2, dtype=torch.bfloat16)
    plain = bg.Pipeline([Merge()]).run(tuned)
    assert plain.parameters["weight"].dtype is torch.bfloat16
    b, a = (tuned.parameters[f"weight_lora_{letter}"].double() for letter in "ba")
    expected = program.parameters["weight"].double() + 8 * b @ a
    assert relative_error(plain.parameters["weight"], expected) < 3e-3


def test_what_would_not_be_exact_is_refused_by_name(program: Program) -> None:
    small = bg.Pipeline([Quantize("int8", activations="none", include=("blocks.0.q",)), LoRA()]).run(program)
    done = bg.Pipeline([Merge()]).run(trained(small))
    assert [(edit.site, "int8 codes" in edit.what) for edit in done.history[-1].declined] == [
        ("blocks.0.q.weight", True)
    ]
    assert {delta.site for delta in deltas_of(done.graph)} == {"blocks.0.q.weight"}
    with pytest.raises(PassError, match=r"changed nothing \(blocks.0.q.weight: its weight is int8 codes"):
        bg.Pipeline([Merge()]).run(done)
    sparse = trained(bg.Pipeline([Prune(), LoRA(targets=("blocks.0.q",))]).run(program))
    with pytest.raises(PassError, match=r"blocks.0.q.weight: its weight is masked.*pattern"):
        bg.Pipeline([Merge()]).run(sparse)


def test_missing_deltas_and_unknown_targets_are_refused(program: Program) -> None:
    with pytest.raises(OrderError, match="pass merge requires delta, which nothing before it provides"):
        bg.compile(program, [Merge()])
    tuned = bg.Pipeline([LoRA()]).run(program)
    with pytest.raises(PassError, match=r"targets='\*\.vv' fits no site; near it: blocks.0.v"):
        bg.Pipeline([Merge(targets=("*.vv",))]).run(tuned)
    with pytest.raises(PassError, match=r"changed nothing: no site of the program fits it$"):
        bg.Pipeline([Merge(), Merge()]).run(tuned)


def test_it_is_replayed_and_its_engine_has_no_delta(program: Program, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    done = bg.Pipeline([LoRA(r=3), Merge()]).run(program)
    done.save(str(tmp_path / "merged"))
    replay_in_a_fresh_process(
        tmp_path / "merged", "from tests.helpers.models import tiny_encoder", "tiny_encoder()"
    )
    tuned, plain = merged(program, LoRA(r=3))
    engine, batch = bg.compile(plain, backend="onnx"), tokens(4, 9, 6)
    assert relative_error(engine(**batch)["logits"], tuned(**batch)["logits"]) < 1e-4
