"""Shrink beyond neurons and heads: layers, channels of the hidden state, queries within groups, features of heads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import AdamW, Onnx, Torch
from bmgraph.errors import InputError, PassError, ResourceError
from bmgraph.ir.program import Program
from bmgraph.passes import Distill, LoRA, Prune, Quantize, Shrink
from bmgraph.verify.metrics import relative_error
from tests.helpers.deltas import replay_in_a_fresh_process
from tests.helpers.grouped_decoder import GroupedDecoder, grouped_decoder
from tests.helpers.models import TinyEncoder, tokens
from tests.helpers.shrunk import by_hand

EXACT = 1e-5
ALL = Shrink(layers=(1,), hidden=0.25, ffn=0.25, heads=0.5, head_size=0.25, scope="global")


@pytest.fixture(scope="module")
def decoder() -> tuple[GroupedDecoder, Program]:
    model = grouped_decoder()
    return model, bg.capture(model, labelled())


def labelled(batch: int = 3, length: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tokens that are their own labels."""
    given = tokens(batch, length, seed)
    return {**given, "labels": given["ids"]}


def distance(program: Program, model: nn.Module) -> float:
    """The largest relative error of the outputs over two sizes."""
    worst = 0.0
    for batch in (labelled(), labelled(5, 11, 1)):
        given = {spec.name: batch[spec.name] for spec in program.inputs}
        with torch.no_grad():
            expected = model(**given)
        worst = max(
            worst, *(relative_error(value, expected[name]) for name, value in program(**given).items())
        )
    return worst


def run(item: Shrink, program: Program, **options: Any) -> Program:
    return bg.Pipeline([item]).run(program, **options)


def kept(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The places of the values that stay of a vector of distinct ones."""
    found = [place for place, value in enumerate(old.tolist()) if value in new.tolist()]
    assert len(found) == len(new)
    return torch.tensor(found)


def without_layers(model: nn.Module, name: str, numbers: tuple[int, ...]) -> nn.Module:
    shorter = copy.deepcopy(model)
    layers = getattr(shorter, name)
    setattr(shorter, name, nn.ModuleList(item for place, item in enumerate(layers) if place not in numbers))
    return shorter


@pytest.mark.parametrize("numbers", [(0,), (2, 1)])
def test_layers_by_number_are_gone(decoder: tuple[GroupedDecoder, Program], numbers: tuple[int, ...]) -> None:
    model, program = decoder
    small = run(Shrink(layers=numbers), program)
    assert distance(small, without_layers(model, "layers", numbers)) < EXACT
    silent = copy.deepcopy(model)
    for number in numbers:
        for linear in (silent.layers[number].o, silent.layers[number].down):
            nn.init.zeros_(linear.weight)
    assert distance(small, silent) < EXACT
    assert {f"layers.{number}" for number in numbers} == {edit.site for edit in small.history[-1].edits}
    gone = tuple(f"layers.{number}." for number in numbers)
    assert not any(name.startswith(gone) for name in small.tensors())
    assert len(small.parameters) == 1 + 1 + (3 - len(numbers)) * 11


def test_the_layer_that_turns_the_hidden_state_least_goes() -> None:
    model = grouped_decoder(4)
    with torch.no_grad():
        for linear in (model.layers[2].o, model.layers[2].down):
            linear.weight *= 0.05
    program = bg.capture(model, labelled())
    given = [tokens(seed=seed) | {"labels": tokens(seed=seed)["ids"]} for seed in range(2)]
    small = run(Shrink(layers=0.25), program, calibration=given)
    assert distance(small, without_layers(model, "layers", (2,))) < EXACT
    states: list[torch.Tensor] = []
    model.layers[2].register_forward_hook(lambda layer, args, result: states.extend((args[0], result)))
    with torch.no_grad():
        for batch in given:
            model(**batch)
    before, after = (torch.cat([item.flatten(0, 1) for item in states[start::2]]) for start in (0, 1))
    cosine = float(nn.functional.cosine_similarity(before, after, -1).mean())
    assert (
        small.history[-1].edits[0].what
        == f"layer 2 removed: cosine of what enters and leaves it {cosine:.4f}"
    )


def test_layers_of_a_post_norm_encoder(program: Program, model: TinyEncoder) -> None:
    for number in (0, 1):
        small = run(Shrink(layers=(number,)), program)
        assert distance(small, without_layers(model, "blocks", (number,))) < EXACT


def sliced(model: nn.Module, program: Program, left: torch.Tensor) -> nn.Module:
    """A copy of a model with the channels `left` alone, along each axis along which the program has fewer."""
    small = copy.deepcopy(model)
    for name, parameter in small.named_parameters():
        for axis, size in enumerate(program.parameters[name].shape):
            if parameter.shape[axis] != size:
                parameter.data = parameter.data.index_select(axis, left)
    return small


def test_channels_are_those_of_a_model_whose_norms_see_them_alone(
    decoder: tuple[GroupedDecoder, Program],
) -> None:
    model, program = decoder
    small = run(Shrink(hidden=0.25), program)
    left = kept(model.norm.weight, small.parameters["norm.weight"])
    assert len(left) == 24
    expected = sliced(model, small, left)
    assert small.parameters["embed.weight"].shape == (50, 24)
    assert distance(small, expected) < EXACT
    assert small.structure().roles == program.structure().roles


def test_an_output_keeps_its_width(program: Program, model: TinyEncoder) -> None:
    """Post-norm, with the hidden state as an output: what is gone is zero there, and goes on being so."""
    small = run(Shrink(hidden=0.25), program)
    assert distance(small, by_hand(model, small)) < EXACT
    batch = tokens(5, 11, 1)
    again = run(Shrink(hidden=0.5), small)
    for item, gone in ((small, 8), (again, 20)):
        hidden = item(**batch)["hidden"]
        assert hidden.shape[-1] == 32
        assert int((hidden == 0).all(0).all(0).sum()) == gone


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (Shrink(queries=0.5), "2 of 4 heads: "),
        (Shrink(heads=0.5), "2 of 4 heads: "),
        (Shrink(head_size=0.25), "6 of 8 features of queries and keys: "),
    ],
    ids=str,
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_what_is_left_of_heads_computes_what_it_did(item: Shrink, said: str, interleaved: bool) -> None:
    model = grouped_decoder(2, interleaved)
    program = bg.capture(model, labelled())
    small = run(item, program)
    assert distance(small, by_hand(model, small)) < EXACT
    assert small.history[-1].edits[0].what.startswith(said)
    assert small.structure().roles == program.structure().roles


def test_rotary_pairs_stay_whole(decoder: tuple[GroupedDecoder, Program]) -> None:
    model, program = decoder
    small = run(Shrink(head_size=0.5), program)
    rows = model.layers[1].k.bias.tolist()
    left = [
        place for place, value in enumerate(rows) if value in small.parameters["layers.1.k.bias"].tolist()
    ]
    assert len(left) == 8
    assert {place % 8 for place in left} == {place % 4 + half for place in left for half in (0, 4)}


def test_all_at_once_trains_deploys_and_comes_back(
    decoder: tuple[GroupedDecoder, Program], tmp_path: Path
) -> None:
    _, program = decoder
    small = run(ALL, program, max_drift=3.0)
    assert [item.features for item in small.structure().feedforwards]
    trainer = bg.compile(small, backend=Torch(optimizer=AdamW(lr=1e-2)))
    losses = [trainer.step(labelled(4, 9)).loss for _ in range(3)]
    assert losses[-1] < losses[0]
    tuned = trainer.program()
    tuned.save(str(tmp_path / "tuned"))
    loaded = bg.load(tmp_path / "tuned")
    for name, value in tuned(**labelled()).items():
        assert torch.equal(loaded(**labelled())[name], value)
    pytest.importorskip("onnxruntime")
    engine = bg.compile(loaded, backend=Onnx(generate=True))
    written = [3, 7, 9]
    for _ in range(4):
        batch = {
            "ids": torch.tensor([written]),
            "attention_mask": torch.ones(1, len(written), dtype=torch.int64),
        }
        logits = tuned(**batch, labels=batch["ids"])["logits"]
        written.append(int(logits[0, -1].argmax()))
    assert engine.generate([[3, 7, 9]], max_new_tokens=4, eos=()) == [written[3:]]


def test_replayed_to_equal_bits(program: Program, tmp_path: Path) -> None:
    run(Shrink(layers=(1,), hidden=0.25, head_size=0.25), program).save(str(tmp_path / "small"))
    replay_in_a_fresh_process(
        tmp_path / "small", "from tests.helpers.models import tiny_encoder", "tiny_encoder()"
    )


def test_deltas_codes_and_teachers_go_with_it(decoder: tuple[GroupedDecoder, Program]) -> None:
    model, program = decoder
    batches = [labelled(seed=seed) for seed in range(2)]
    for earlier in ([LoRA(r=2, roles=("*",))], [Quantize("int8", activations="none")], [Prune()]):
        given = bg.Pipeline(earlier).run(program, max_drift=3.0)
        small = bg.Pipeline([Shrink(hidden=0.25, head_size=0.5), Shrink(layers=(0,))]).run(
            given, max_drift=3.0
        )
        widths = {size for name, item in small.parameters.items() if "first" in name for size in item.shape}
        assert widths == {24}
    student = bg.Pipeline(
        [
            Shrink(layers=(1,), hidden=0.25),
            Distill(teacher="teacher", data="text", steps=2, on=("logits", "hidden"), layers=((1, 2),)),
            Quantize("int8", activations="none"),
        ]
    ).run(program, resources={"teacher": model, "text": batches}, max_drift=3.0)
    assert [record.text[:7] for record in student.history] == ["shrink{", "distill", "quantiz"]


def test_bad_input_is_refused(decoder: tuple[GroupedDecoder, Program], program: Program) -> None:
    _, grouped = decoder
    with pytest.raises(PassError, match=r"layers=\[3\]: the program's layers are 0 to 2"):
        run(Shrink(layers=(3,)), grouped)
    with pytest.raises(
        PassError, match=r"layers=\[0, 1, 2\]: leaves no layer of the stack that layers\.0 is in"
    ):
        run(Shrink(layers=(0, 1, 2)), grouped)
    with pytest.raises(InputError, match=r"layers=\[1, 1\]: number layers from 0 on, and each once"):
        Shrink(layers=(1, 1))
    with pytest.raises(
        InputError, match=r"layers=2: leaves no layer; .* or the numbers of layers, as in layers=\[2\]"
    ):
        Shrink(layers=2)
    with pytest.raises(InputError, match=r"hidden=1\.0: leaves no channel"):
        Shrink(hidden=1.0)
    with pytest.raises(ResourceError, match="calibration"):
        run(Shrink(layers=0.5), grouped)
    with pytest.raises(PassError, match=r"no keys and values are shared by several of its heads"):
        run(Shrink(queries=0.5), program)
    with pytest.raises(PassError, match=r"changed nothing .*0\.1 of its 8 features of values rounds to zero"):
        run(Shrink(head_size=0.1), program)
    plain = bg.capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), (torch.randn(3, 4),))
    with pytest.raises(PassError, match="the program has no repeated layers"):
        run(Shrink(layers=(0,)), plain)
    with pytest.raises(PassError, match="changed nothing"):
        run(Shrink(hidden=0.5), plain)
