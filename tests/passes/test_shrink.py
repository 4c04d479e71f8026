"""Shrink: golden graph; the smaller program equals the full one with removed units zeroed, for all weight forms."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.errors import InputError, PassError
from bmgraph.ir.pass_record import Record
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.passes import LoRA, Prune, Quantize, Shrink
from bmgraph.passes.shrink.slice_program import remove_units
from bmgraph.verify.metrics import relative_error
from tests.analysis.coupling.test_coupled_dims import spread
from tests.analysis.structure.test_structure import WIDTH, Attention
from tests.helpers.deltas import Stored, replay_in_a_fresh_process, trained
from tests.helpers.engines import matrices
from tests.helpers.models import TinyEncoder, tiny_encoder, tokens
from tests.helpers.shrunk import with_zeros
from tests.helpers.training import captured_to_train, labelled
from tests.passes.test_prune import most_in_a_group, weights
from tests.passes.test_split_outliers import _loud

Batches = list[dict[str, torch.Tensor]]

EXACT = 1e-5
BACKBONE = "transformer.h.0.attn.c_attn.weight"
UNEVEN = Shrink(ffn=0.3, heads=0.5, scope="global")


def silenced(before: Program, after: Program) -> Program:
    """The program before, with zeros where `down`, `o` and deltas on them read removed units."""
    silent = before.clone()
    for edit in after.history[-1].edits:
        for name in (edit.site, f"{edit.site}_codes", f"{edit.site}_lora_a"):
            if name in after.parameters:
                silent.parameters[name] = with_zeros(before.parameters[name], after.parameters[name])
    return silent


def distance(one: Program, other: Program) -> float:
    """The largest relative error of the outputs over two sizes."""
    return max(
        relative_error(one(**batch)[key], value)
        for batch in (tokens(), tokens(5, 11, 1))
        for key, value in other(**batch).items()
    )


def said(record: Record) -> dict[str, tuple[list[int], list[int]]]:
    """Matrix -> (sizes before, sizes after), as the report states them."""
    found = {}
    for edit in record.edits:
        for name, before, after in re.findall(r"(\S+) \[([\d, ]+)\] -> \[([\d, ]+)\]", edit.what):
            found[name] = ([int(n) for n in before.split(", ")], [int(n) for n in after.split(", ")])
    return found


def test_the_rewritten_graph_is_golden() -> None:
    layer = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    program = bg.capture(layer, {"input": torch.randn(3, 4)})
    small = bg.Pipeline([Shrink(ffn=0.25)]).run(program)
    assert str(small) == (
        "forward(input: f32[batch, 4]):\n"
        "  %linear = aten.linear(%input, 0.weight, 0.bias) : f32[batch, 6]\n"
        "  %relu = aten.relu(%linear) : f32[batch, 6]\n"
        "  %linear_1 = aten.linear(%relu, 2.weight, 2.bias) : f32[batch, 4]\n"
        "  return output=%linear_1\n"
    )
    assert small.history[-1].edits[0].what == (
        "6 of 8 neurons: 0.weight [8, 4] -> [6, 4], 2.weight [4, 8] -> [4, 6]"
    )


def test_heads_of_a_fused_linear_that_share_keys_are_golden() -> None:
    program = bg.capture(Attention(fused=True, kv=2), (torch.randn(2, 6, WIDTH),))
    small = bg.Pipeline([Shrink(heads=0.5)]).run(program)
    assert str(small) == (
        "forward(x: f32[batch, sequence, 16]):\n"
        "  %linear = aten.linear(%x, all.weight, all.bias) : f32[batch, sequence, 16]\n"
        "  %split_with_sizes = aten.split_with_sizes(%linear, [8, 4, 4], 2)\n"
        "  %getitem = operator.getitem(%split_with_sizes, 0) : f32[batch, sequence, 8]\n"
        "  %getitem_1 = operator.getitem(%split_with_sizes, 1) : f32[batch, sequence, 4]\n"
        "  %getitem_2 = operator.getitem(%split_with_sizes, 2) : f32[batch, sequence, 4]\n"
        "  %unflatten = aten.unflatten.int(%getitem, -1, [-1, 4]) : f32[batch, sequence, 2, 4]\n"
        "  %transpose = aten.transpose.int(%unflatten, 1, 2) : f32[batch, 2, sequence, 4]\n"
        "  %unflatten_1 = aten.unflatten.int(%getitem_1, -1, [-1, 4]) : f32[batch, sequence, 1, 4]\n"
        "  %transpose_1 = aten.transpose.int(%unflatten_1, 1, 2) : f32[batch, 1, sequence, 4]\n"
        "  %unflatten_2 = aten.unflatten.int(%getitem_2, -1, [-1, 4]) : f32[batch, sequence, 1, 4]\n"
        "  %transpose_2 = aten.transpose.int(%unflatten_2, 1, 2) : f32[batch, 1, sequence, 4]\n"
        "  %repeat_interleave = aten.repeat_interleave.self_int(%transpose_1, 2, 1) : f32[batch, 2, sequence, 4]\n"
        "  %repeat_interleave_1 = aten.repeat_interleave.self_int(%transpose_2, 2, 1) : f32[batch, 2, sequence, 4]\n"
        "  %scaled_dot_product_attention = aten.scaled_dot_product_attention(%transpose, %repeat_interleave, "
        "%repeat_interleave_1) : f32[batch, 2, sequence, 4]\n"
        "  %transpose_3 = aten.transpose.int(%scaled_dot_product_attention, 1, 2) : f32[batch, sequence, 2, 4]\n"
        "  %flatten = aten.flatten.using_ints(%transpose_3, -2) : f32[batch, sequence, 8]\n"
        "  %linear_1 = aten.linear(%flatten, out.weight, out.bias) : f32[batch, sequence, 16]\n"
        "  return output=%linear_1\n"
    )
    assert small.history[-1].edits[0].what == (
        "2 of 4 heads: all.weight [32, 16] -> [16, 16], out.weight [16, 16] -> [16, 8]"
    )


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_shrunk_equals_zeroed_and_roles_stay(program: Program, scope: str) -> None:
    small = bg.Pipeline([Shrink(ffn=0.3, heads=0.5, scope=scope)]).run(program)
    assert small.structure().roles == program.structure().roles
    assert distance(small, silenced(program, small)) < EXACT
    widths = [item.features for item in small.structure().feedforwards]
    heads = [item.heads for item in small.structure().attentions]
    assert sum(heads) == 4
    assert sum(widths) in (90, 128 - 38)
    assert scope == "global" or (widths == [45, 45] and heads == [2, 2])
    assert (small.inputs, small.ranges) == (program.inputs, program.ranges)
    assert [str(spec) for spec in small.outputs] == [str(spec) for spec in program.outputs]


def test_the_least_go_and_layers_become_uneven(program: Program) -> None:
    uneven = program.clone()
    for name in ("up.weight", "up.bias"):
        uneven.parameters[f"blocks.1.{name}"] = program.parameters[f"blocks.1.{name}"].clone()
        uneven.parameters[f"blocks.1.{name}"][10:42] = 0.001
    uneven.parameters["blocks.1.down.weight"] = program.parameters["blocks.1.down.weight"].clone()
    uneven.parameters["blocks.1.down.weight"][:, 10:42] *= 0.001
    small = bg.Pipeline([Shrink(ffn=0.25, scope="global")]).run(uneven)
    assert [item.features for item in small.structure().feedforwards] == [64, 32]
    kept = [place for place in range(64) if not 10 <= place < 42]
    assert torch.equal(small.parameters["blocks.1.up.weight"], uneven.parameters["blocks.1.up.weight"][kept])
    assert distance(small, uneven) < 0.01


@pytest.mark.parametrize(
    "earlier",
    [
        [Quantize("int8", activations="none")],
        [Quantize("int8", activations="static", outliers=False)],
        [Quantize("int8", activations="none"), Prune()],
        [Prune()],
        [Prune(), LoRA(r=2, roles=("*",))],
        [LoRA(r=2, roles=("*",))],
        [
            Quantize("int8", activations="none"),
            LoRA(r=2, roles=("attention.*", "feedforward.*"), dropout=0.1),
        ],
    ],
    ids=lambda earlier: "-".join(str(item) for item in earlier),
)
def test_codes_scales_masks_and_deltas_shrink_too(
    program: Program, batches: Batches, earlier: list[Pass]
) -> None:
    given = bg.Pipeline(earlier).run(program, calibration=batches)
    if any(isinstance(item, LoRA) for item in earlier):
        given = trained(given, size=0.1)
    small = bg.Pipeline([Shrink(ffn=0.25, heads=0.25)]).run(given)
    assert small.structure().roles == given.structure().roles
    assert distance(small, silenced(given, small)) < EXACT
    if any(isinstance(item, Prune) for item in earlier):
        assert all(most_in_a_group(weight) == 2 for weight in weights(small).values())
    assert small.frozen == given.frozen


def test_copies_of_neurons_that_stand_out_are_neurons_of_their_own() -> None:
    given, x, _ = _loud(nn.ReLU())
    whole = bg.Pipeline([Quantize("int8", activations="static")]).run(given, calibration=[{"x": x}])
    copies = whole.parameters["up.weight_codes"].shape[0] - 128
    assert copies > 0
    small = bg.Pipeline([Shrink(ffn=0.25)]).run(whole)
    assert small.parameters["up.weight_codes"].shape[0] == 128 + copies - (128 + copies) // 4
    left = set(small.parameters["up.bias"].tolist())
    gone = [place for place, bias in enumerate(whole.parameters["up.bias"].tolist()) if bias not in left]
    silent = whole.clone()
    silent.parameters["down.weight_codes"] = whole.parameters["down.weight_codes"].clone()
    silent.parameters["down.weight_codes"][:, gone] = 0
    assert relative_error(small(x=x)["output"], silent(x=x)["output"]) < EXACT


def test_copies_of_channels_are_numbered_anew() -> None:
    """Of six neurons the third and fifth are read twice, as split outliers are; the fifth is removed."""

    class Copied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(8, 4)
            self.register_buffer("places", torch.tensor([4, 2]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.relu(self.up(x))
            return self.down(torch.cat([hidden, hidden.index_select(-1, self.places)], -1))

    x = torch.randn(3, 4)
    program = bg.capture(Copied(), {"x": x})
    silent = program.clone()
    silent.parameters["down.weight"] = program.parameters["down.weight"].clone()
    silent.parameters["down.weight"][:, [4, 6]] = 0
    remove_units(program, spread(program, "up.weight", list(range(6))), [4], "test", "down.weight")
    assert program.parameters["down.weight"].shape == (4, 6)
    assert program.parameters["down.weight_places"].tolist() == [2]
    assert relative_error(program(x=x)["output"], silent(x=x)["output"]) < EXACT


def test_a_shrunk_program_shrinks_again(program: Program) -> None:
    once = bg.Pipeline([Shrink(ffn=0.25, heads=0.25)]).run(program)
    twice = bg.Pipeline([Shrink(ffn=0.5, heads=0.34)]).run(once)
    assert [item.features for item in twice.structure().feedforwards] == [24, 24]
    assert [item.heads for item in twice.structure().attentions] == [2, 2]
    assert distance(twice, silenced(once, twice)) < EXACT


def test_a_weight_stored_the_other_way_loses_columns() -> None:
    class Forward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = Stored(16, 32), Stored(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x)))

    x = torch.randn(3, 16)
    program = bg.capture(Forward(), {"x": x})
    small = bg.Pipeline([Shrink(ffn=0.25)]).run(program)
    assert (small.parameters["up.w"].shape, small.parameters["down.w"].shape) == ((16, 24), (24, 16))
    assert relative_error(small(x=x)["output"], silenced(program, small)(x=x)["output"]) < EXACT


@pytest.mark.slow
def test_it_trains_a_delta_and_goes_on_to_int8(batches: Batches) -> None:
    """Uneven layers, then a delta trained by the Trainer, then int8, down to an engine."""
    pytest.importorskip("onnxruntime")
    program = captured_to_train("gpt2")
    small = bg.Pipeline([UNEVEN]).run(program)
    given = [labelled("gpt2", 4, 11, seed=1)] * 6
    for one, other in zip(small(**given[0]).values(), silenced(program, small)(**given[0]).values()):
        assert relative_error(one, other) < EXACT
    trainer = bg.compile(small, [LoRA(r=2, roles=("*",))], backend=Torch(optimizer=AdamW(lr=1e-2)))
    losses = [trainer.step(batch).loss for batch in given]
    assert losses[-1] < losses[0]
    tuned = trainer.program()
    assert torch.equal(tuned.parameters[BACKBONE], small.parameters[BACKBONE])
    engine = bg.compile(tuned, [Quantize("int8", activations="none")], backend="onnx")
    assert engine.report.total_drift is not None
    assert engine.report.total_drift < 0.05
    codes = matrices(engine)
    for name, (_, after) in said(small.history[-1]).items():
        assert sorted(codes[f"{name}_codes"].shape) == sorted(after)


@pytest.mark.parametrize(
    ("later", "padded"),
    [
        ([], True),
        ([Quantize("int8", activations="static")], True),
        ([Quantize("int8", activations="none", smallest=8)], False),
    ],
    ids=["fp32", "int8", "weights"],
)
def test_the_matrices_of_the_engine_are_smaller_as_the_report_says(
    program: Program, batches: Batches, later: list[Pass], padded: bool
) -> None:
    pytest.importorskip("onnxruntime")
    small = bg.Pipeline([UNEVEN]).run(program)
    engine = bg.compile(small, later, backend="onnx", calibration=batches)
    whole = matrices(bg.compile(program, later, backend="onnx", calibration=batches))
    changes = said(small.history[-1])
    assert len(changes) == 2 * 6
    fewer = sum(math.prod(before) - math.prod(after) for before, after in changes.values())
    if padded:
        fewer += _padding_columns(program) - _padding_columns(small)
    found = matrices(engine)
    assert sum(item.size for item in whole.values()) - sum(item.size for item in found.values()) == fewer
    if not later:
        expected = silenced(program, small)(**tokens())["logits"]
        assert relative_error(engine(**tokens())["logits"], expected) < 1e-4


def _padding_columns(program: Program) -> int:
    """The columns that engines add to queries and keys: one per head, for the padding mask."""
    return sum(2 * item.heads * 32 for item in program.structure().attentions)


@pytest.mark.slow  # that of LoRA is quick
def test_it_is_replayed_to_equal_bits_in_another_process(
    program: Program, model: TinyEncoder, tmp_path: Path
) -> None:
    bg.Pipeline([UNEVEN]).run(program).save(str(tmp_path / "small"))
    replay_in_a_fresh_process(
        tmp_path / "small", "from tests.helpers.models import tiny_encoder", "tiny_encoder()"
    )


def test_saved_and_loaded(program: Program, tmp_path: Path) -> None:
    small = bg.Pipeline([UNEVEN]).run(program)
    small.save(str(tmp_path / "small"))
    loaded = bg.load(tmp_path / "small")
    assert str(loaded) == str(small)
    assert torch.equal(loaded(**tokens())["logits"], small(**tokens())["logits"])
    again = bg.Pipeline([Shrink(ffn=0.3, heads=0.5)]).run(loaded)
    assert again.structure().roles == program.structure().roles


def test_a_meta_program_shrinks_without_weights(program: Program) -> None:
    small = bg.Pipeline([Shrink(ffn=0.25, heads=0.25)]).run(program.to("meta"))
    assert small.parameters["blocks.0.q.weight"].shape == (24, 32)
    assert small.parameters["blocks.0.q.weight"].device.type == "meta"


def test_the_given_program_is_left_alone(program: Program) -> None:
    text, shapes = str(program), {name: item.shape for name, item in program.parameters.items()}
    bg.Pipeline([Shrink(ffn=0.25, heads=0.25)]).run(program)
    assert str(program) == text
    assert {name: item.shape for name, item in program.parameters.items()} == shapes


def test_options_out_of_range_are_refused(program: Program) -> None:
    with pytest.raises(InputError, match=r"heads=1\.0: leaves no head; give a share from 0 to below 1"):
        Shrink(heads=1.0)
    with pytest.raises(InputError, match=r"ffn=1\.5: leaves no neuron"):
        Shrink(ffn=1.5)
    with pytest.raises(InputError, match="give a share of neurons"):
        Shrink()
    with pytest.raises(InputError, match=r"scope='model': choose one of layer, global"):
        Shrink(ffn=0.5, scope="model")
    with pytest.raises(InputError, match=r"score='size': choose one of magnitude"):
        Shrink(ffn=0.5, score="size")
    with pytest.raises(PassError, match=r"changed nothing .*0\.2 of its 4 heads rounds to zero"):
        bg.Pipeline([Shrink(heads=0.2)]).run(program)
    with pytest.raises(PassError, match=r"include='\*\.dwn' fits no site; near it: .*down"):
        bg.Pipeline([Shrink(ffn=0.5, include=("*.dwn",))]).run(program)


def test_heads_that_would_break_the_groups_of_a_pattern_stay() -> None:
    pruned = bg.Pipeline([Prune()]).run(bg.capture(tiny_encoder(width=12, heads=2, hidden=16), tokens()))
    record = bg.Pipeline([Shrink(ffn=0.25, heads=0.5)]).run(pruned).history[-1]
    assert [edit.site for edit in record.edits] == ["blocks.0.down.weight", "blocks.1.down.weight"]
    assert {edit.what for edit in record.declined} == {
        "its head size 6 is not a multiple of the groups of 4 of its sparsity pattern"
    }


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_share_is_counted_as_it_is_written(scope: str) -> None:
    """0.29 of 100 neurons are 29, although 0.29 * 100 is a little less."""
    layer = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 4))
    small = bg.Pipeline([Shrink(ffn=0.29, scope=scope)]).run(bg.capture(layer, (torch.randn(3, 4),)))
    assert small.parameters["0.weight"].shape == (71, 4)


def test_one_always_stays(program: Program) -> None:
    for scope in ("layer", "global"):
        small = bg.Pipeline([Shrink(ffn=0.99, heads=0.99, scope=scope)]).run(program)
        assert min(item.features for item in small.structure().feedforwards) >= 1
        assert min(item.heads for item in small.structure().attentions) >= 1
        assert distance(small, silenced(program, small)) < EXACT


def test_what_a_backend_runs_first_is_in_no_order_that_is_offered() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).bfloat16()
    with pytest.raises(PassError, match="rounds to zero") as told:
        bg.compile(
            model, [Shrink(ffn=0.001)], example=(torch.randn(2, 8, dtype=torch.bfloat16),), backend="onnx"
        )
    assert "try this order" not in str(told.value)
